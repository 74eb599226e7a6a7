"""Collectives as values: an algorithm yields the collective it needs, a driver performs it.

An *exchange* is a generator. It yields a request and is resumed with the answer::

    mean = yield AllReduceMean(buffer, "P factors")            # paused until the mean is there
    in_flight = yield Start(AllReduceMean(buffer, "Q factors"))  # resumed at once
    ...                                                          # work that needs no answer
    mean = yield in_flight                                       # paused until the mean is there

A buffer belongs to the collective from the moment it is yielded until its answer has been
received; in between it is neither read nor written. Drivers run exchanges within `leave_modes`.

The same exchange runs over a torch.distributed group (`efsgd.wire.transports.ProcessGroup`), over
nobody (`efsgd.wire.transports.Alone`) and, with many workers in one thread, in
`efsgd.testing.lockstep`. A new collective is a subclass of `Collective`, and nothing else.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Devices whose operations autocast may change.
_KINDS = "cpu", "cuda", "mps", "xpu", "hpu", "mtia", "xla"
_AUTOCAST = tuple(kind for kind in _KINDS if torch.amp.is_autocast_available(kind))


@dataclass(frozen=True, eq=False)
class Collective:
    """What workers do together: how it is launched, and what every worker gets.

    Attributes:
        buffer: contiguous tensor, of equal shape and dtype on every worker.
        purpose: what is sent, for error messages and traces.
        source: a worker, counted within the group, where the collective has one.
        writes_buffer: whether the answer is written into `buffer`; otherwise that is left alone.
    """

    buffer: Tensor
    purpose: str
    source: int = 0
    writes_buffer: ClassVar[bool] = True

    @property
    def nbytes(self) -> int:
        """The size of what this worker hands over, in bytes."""
        return self.buffer.numel() * self.buffer.element_size()

    def launch(self, group: "dist.ProcessGroup | None") -> "Launched":
        """Starts it on a torch.distributed group."""
        raise NotImplementedError

    def combine(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """The answer of each worker, from the buffers of all in worker order; none is modified."""
        raise NotImplementedError

    def require_workers(self, count: int) -> None:
        """Raises ValueError where the buffer does not fit so many workers."""


class AllReduceMean(Collective):
    """The mean of `buffer` over all workers, written into `buffer`, bitwise equal everywhere.

    Its buffer is a floating-point tensor.
    """

    def launch(self, group: "dist.ProcessGroup | None") -> "Launched":
        """A sum that is divided later: gloo has no mean."""
        work = dist.all_reduce(self.buffer, group=group, async_op=True)
        return work, lambda: self.buffer.div_(dist.get_world_size(group))

    def combine(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """One worker after the other is added, so that the sum is the same on all."""
        if len(buffers) == 1:
            return list(buffers)
        mean = buffers[0].clone()
        for buffer in buffers[1:]:
            mean += buffer
        return [mean.div_(len(buffers))] * len(buffers)


class AllGather(Collective):
    """The buffers of all workers, stacked in worker order: shape `[world_size, *buffer.shape]`."""

    writes_buffer = False

    def launch(self, group: "dist.ProcessGroup | None") -> "Launched":
        """Gathers into new memory."""
        gathered = self.buffer.new_empty((dist.get_world_size(group), *self.buffer.shape))
        parts = list(gathered.unbind(0))
        work = dist.all_gather(parts, self.buffer, group=group, async_op=True)
        return work, lambda: gathered

    def combine(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """A stack for each worker; of one buffer it is a view."""
        if len(buffers) == 1:
            return [buffers[0].unsqueeze(0)]
        return [torch.stack(list(buffers)) for _ in buffers]


class AllToAll(Collective):
    """Row w of the answer is the row that worker w has for this worker; shape `buffer.shape`.

    Its buffer has a row for each worker, its own one too.
    """

    writes_buffer = False

    def launch(self, group: "dist.ProcessGroup | None") -> "Launched":
        """Receives into new memory."""
        rows = self.buffer.new_empty(self.buffer.shape)
        work = dist.all_to_all_single(rows, self.buffer, group=group, async_op=True)
        return work, lambda: rows

    def combine(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Column w of the table of all rows is what worker w receives."""
        if len(buffers) == 1:
            return list(buffers)
        return [torch.stack([rows[worker] for rows in buffers]) for worker in range(len(buffers))]

    def require_workers(self, count: int) -> None:
        """There must be a row for each worker."""
        if len(self.buffer) != count:
            raise ValueError(f"{self.purpose} must have a row for each of {count} workers")


class Broadcast(Collective):
    """The buffer of worker `source`, written into `buffer` on every worker."""

    def launch(self, group: "dist.ProcessGroup | None") -> "Launched":
        """Overwrites the buffer, except on the source."""
        work = dist.broadcast(self.buffer, group_src=self.source, group=group, async_op=True)
        return work, lambda: self.buffer

    def combine(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """That of the source, for all."""
        return [buffers[self.source]] * len(buffers)


#: What `torch.distributed` has started, and a function that gives the answer once that is done.
Launched: TypeAlias = tuple[Any, Callable[[], Tensor]]


@dataclass(frozen=True, eq=False)
class Start:
    """Asks that `collective` be started; the answer is an `InFlight`, to be yielded later."""

    collective: Collective


@dataclass(frozen=True, eq=False)
class InFlight:
    """A collective that was started; yielding it waits for its answer.

    Attributes:
        collective: what was started.
        wait: returns the answer, once it is there.
    """

    collective: Collective
    wait: Callable[[], Tensor]


#: What an exchange may yield.
Request: TypeAlias = Collective | Start | InFlight


#: An algorithm that pauses at its collectives and returns a `T`.
Exchange: TypeAlias = Generator[Request, Any, T]


class Transport(Protocol):
    """Carries collectives between workers.

    Law: `start` may return before the collective is done; the function it returns waits and
    gives the answer. Collectives that are started in one order on every worker complete.
    A collective that fails raises a `CollectiveError`, from `start` or from that function.
    """

    @property
    def world_size(self) -> int:
        """The number of workers."""

    @property
    def worker(self) -> int:
        """This process's place among the workers, from 0."""

    def start(self, collective: Collective) -> Callable[[], Tensor]:
        """Starts `collective`; the returned function waits for the answer."""


def intercept(
    exchange: Exchange[T],
    outgoing: Callable[[Collective], None],
    incoming: Callable[[Tensor], None] | None = None,
    in_flight: dict[Collective, InFlight] | None = None,
) -> Exchange[T]:
    """The same exchange, watched.

    Args:
        exchange: the exchange to pass on.
        outgoing: called with each collective before it is handed over; may change its buffer.
        incoming: called with each answer before `exchange` receives it.
        in_flight: holds what was started and is not answered (modified in place).
    """
    in_flight = {} if in_flight is None else in_flight
    answer: Tensor | InFlight | None = None
    failure: Exception | None = None
    while True:
        try:
            request = exchange.send(answer) if failure is None else exchange.throw(failure)
        except StopIteration as end:
            result: T = end.value
            return result
        answer = failure = None
        if isinstance(request, InFlight):
            in_flight.pop(request.collective, None)
        else:
            outgoing(request.collective if isinstance(request, Start) else request)
        try:
            answer = yield request
        except Exception as error:
            failure = error
        if isinstance(answer, InFlight):
            in_flight[answer.collective] = answer
        elif incoming and answer is not None:
            incoming(answer)


@contextlib.contextmanager
def leave_modes() -> Iterator[None]:
    """Leaves autograd, inference mode and autocast of the thread behind; also as a decorator.

    Within them results would not be other workers', nor tensors what later steps need. So drivers,
    construction and loading run without. Who makes a tensor names its dtype and device.

    Example:
        >>> from efsgd.wire.collectives import leave_modes
        >>> with torch.inference_mode(), leave_modes():
        ...     torch.zeros(2).is_inference()
        False
    """
    with contextlib.ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())  # the last: without inference mode autograd is on
        yield


@leave_modes()
def run(exchange: Exchange[T], transport: Transport, call: str = "an exchange") -> T:
    """Drives `exchange` over `transport` and returns its result.

    An error of the transport is raised inside the exchange, at the line that asked.

    Args:
        exchange: the generator to drive.
        transport: performs the collectives.
        call: which call of the program this is, for errors; a transport that has a method `begin`
            is told by it.

    Example:
        >>> from efsgd.wire.collectives import AllReduceMean, run
        >>> from efsgd.wire.transports import Alone
        >>> def mean_of(values):
        ...     return (yield AllReduceMean(values, "an example"))
        >>> run(mean_of(torch.tensor([3.0])), Alone())
        tensor([3.])
    """
    begin = getattr(transport, "begin", None)
    if begin is not None:
        begin(call)
    answer: Tensor | InFlight | None = None
    failure: Exception | None = None
    while True:
        try:
            request = exchange.send(answer) if failure is None else exchange.throw(failure)
        except StopIteration as end:
            result: T = end.value
            return result
        answer = failure = None
        try:
            match request:
                case Start(collective):
                    answer = InFlight(collective, transport.start(collective))
                case InFlight():
                    answer = request.wait()
                case _:
                    answer = transport.start(request)()
        except Exception as error:
            failure = error
