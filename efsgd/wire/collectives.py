"""Collectives as values: an algorithm yields the collective it needs, a driver performs it.

An *exchange* is a generator. It yields a request and is resumed with the answer::

    mean = yield AllReduceMean(buffer, "P factors")            # paused until the mean is there

    in_flight = yield Start(AllReduceMean(buffer, "Q factors"))  # resumed at once
    ...                                                          # work that needs no answer
    mean = yield in_flight                                       # paused until the mean is there

A buffer belongs to the collective from the moment it is yielded until its answer has been
received; in between it is neither read nor written.

The same exchange runs over a torch.distributed group (`efsgd.wire.transports.ProcessGroup`), over
nobody (`efsgd.wire.transports.Alone`) and, with many workers in one thread, in
`efsgd.testing.lockstep`.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class AllReduceMean:
    """The mean of `buffer` over all workers, written into `buffer`, bitwise equal everywhere.

    Attributes:
        buffer: contiguous floating-point tensor, of equal shape and dtype on every worker.
        purpose: what is sent, for error messages and traces.
    """

    buffer: Tensor
    purpose: str


@dataclass(frozen=True, eq=False)
class AllGather:
    """The buffers of all workers, stacked in worker order: shape `[world_size, *buffer.shape]`.

    Attributes:
        buffer: contiguous tensor, of equal shape and dtype on every worker.
        purpose: what is sent, for error messages and traces.
    """

    buffer: Tensor
    purpose: str


@dataclass(frozen=True, eq=False)
class AllToAll:
    """Row w of the answer is the row that worker w has for this worker; shape `buffer.shape`.

    Attributes:
        buffer: contiguous tensor, of equal shape and dtype on every worker: a row for each worker,
            its own one too. Not written to.
        purpose: what is sent, for error messages and traces.
    """

    buffer: Tensor
    purpose: str


@dataclass(frozen=True, eq=False)
class Broadcast:
    """The buffer of worker `source`, written into `buffer` on every worker.

    Attributes:
        buffer: contiguous tensor, of equal shape and dtype on every worker.
        purpose: what is sent, for error messages and traces.
        source: the sending worker, counted within the group.
    """

    buffer: Tensor
    purpose: str
    source: int = 0


#: What workers do together.
Collective: TypeAlias = AllReduceMean | AllGather | AllToAll | Broadcast


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
    asking: Callable[[Request], None] | None = None,
) -> Exchange[T]:
    """The same exchange, watched.

    Args:
        exchange: the exchange to pass on.
        outgoing: called with each collective before it is handed over; may change its buffer.
        incoming: called with each answer before `exchange` receives it.
        asking: called with each request as it is passed on.

    Returns:
        The result of `exchange`.
    """
    answer: Tensor | InFlight | None = None
    failure: Exception | None = None
    while True:
        try:
            request = exchange.send(answer) if failure is None else exchange.throw(failure)
        except StopIteration as end:
            result: T = end.value
            return result
        answer = failure = None
        if isinstance(request, Start):
            outgoing(request.collective)
        elif not isinstance(request, InFlight):
            outgoing(request)
        if asking is not None:
            asking(request)
        try:
            answer = yield request
        except Exception as error:
            failure = error
        if incoming is not None and isinstance(answer, Tensor):
            incoming(answer)


def run(
    exchange: Exchange[T],
    transport: Transport,
) -> T:
    """Drives `exchange` over `transport` and returns its result.

    An error of the transport is raised inside the exchange, at the line that asked.

    Args:
        exchange: the generator to drive.
        transport: performs the collectives.

    Example:
        >>> from efsgd.wire.collectives import AllReduceMean, run
        >>> from efsgd.wire.transports import Alone
        >>> def mean_of(values):
        ...     return (yield AllReduceMean(values, "an example"))
        >>> run(mean_of(torch.tensor([3.0])), Alone())
        tensor([3.])
    """
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
