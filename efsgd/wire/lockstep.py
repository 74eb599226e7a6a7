"""Many workers in one thread: deterministic tests without processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from efsgd.errors import CollectiveError
from efsgd.layout import is_fake
from efsgd.wire.collectives import Collective, Exchange, InFlight, Request, Start, leave_modes

T = TypeVar("T")


class LockstepError(AssertionError):
    """Workers asked for different things, or touched a buffer in flight: a hang or a race."""


@dataclass(frozen=True)
class Traced:
    """One collective that all workers took part in.

    Attributes:
        kind: "AllReduceMean", "AllGather", "AllToAll" or "Broadcast".
        purpose: what was sent.
        shape: of each worker's buffer.
        dtype: of each worker's buffer.
    """

    kind: str
    purpose: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The size of one worker's buffer."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Lockstep(Generic[T]):
    """What came of driving some exchanges together.

    Attributes:
        results: of each worker.
        trace: the collectives, in order.
    """

    results: list[T]
    trace: list[Traced]


def lockstep(exchanges: Sequence[Exchange[T]], *, fail_at: int | None = None) -> Lockstep[T]:
    """Drives one exchange per worker, all in this thread.

    Means are sums in worker order, divided by the number of workers. It is checked that all
    workers ask for the same collectives (kind, purpose, shape, dtype) in the same order, and that
    nobody writes to a buffer in flight. Nobody should read it, either: it is full of NaN meanwhile,
    and stays so if the collective fails.

    Args:
        exchanges: one for each worker, in worker order.
        fail_at: the number of a collective, from 0, that fails on every worker: its answer is a
            `CollectiveError`, raised at the line that waits for it.

    Returns:
        All results, and the trace.

    Raises:
        LockstepError: the workers disagree, or one raised while others wait for it.
        Exception: what the exchanges raise, if all of them raise it; worker 0's.

    Example:
        >>> from efsgd.wire.collectives import AllReduceMean
        >>> from efsgd.testing import lockstep
        >>> def mean_of(value):
        ...     return (yield AllReduceMean(torch.tensor([value]), "an example")).item()
        >>> lockstep([mean_of(1.0), mean_of(2.0)]).results
        [1.5, 1.5]
    """
    return _Conductor(exchanges, fail_at).run()


def step_together(optimizers: Sequence[Any], *, fail_at: int | None = None) -> list[Traced]:
    """One `step()` of several optimizers, each a worker of one group, without processes.

    Args:
        optimizers: each an `ErrorFeedbackSGD`, one for each worker, in worker order, whose
            parameters have their gradients.
        fail_at: see `lockstep`.

    Returns:
        The trace.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.testing import step_together
        >>> workers = [torch.zeros(2, requires_grad=True) for _ in range(2)]
        >>> optimizers = [PowerSGDOptimizer([x], lr=0.5, momentum_form="sgd") for x in workers]
        >>> workers[0].grad, workers[1].grad = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])
        >>> trace = step_together(optimizers)
        >>> workers[0].tolist(), workers[1].tolist()
        ([-1.0, -1.0], [-1.0, -1.0])
    """
    exchanges = [
        optimizer.exchange(len(optimizers), worker) for worker, optimizer in enumerate(optimizers)
    ]
    return lockstep(exchanges, fail_at=fail_at).trace


class _Conductor(Generic[T]):
    """Keeps the state of one call of `lockstep`."""

    def __init__(self, exchanges: Sequence[Exchange[T]], fail_at: int | None) -> None:
        self._exchanges = list(exchanges)
        self._fail_at = fail_at
        self._trace: list[Traced] = []
        # What is in flight: by the number of the collective, what each worker has handed over.
        self._started: dict[int, list[tuple[Collective, Tensor]]] = {}

    @leave_modes()
    def run(self) -> Lockstep[T]:
        answers: list[Any] = [None] * len(self._exchanges)
        while True:
            outcomes = [self._resume(*pair) for pair in zip(self._exchanges, answers, strict=True)]
            kinds = {kind for kind, _ in outcomes}
            values = [value for _, value in outcomes]
            if kinds == {"returned"}:
                return Lockstep(values, self._trace)
            if kinds == {"raised"}:
                for worker, error in enumerate(values[1:], start=1):
                    values[0].add_note(f"worker {worker}: {type(error).__name__}: {error}")
                raise values[0]
            if kinds != {"asked"}:
                state = "; ".join(f"worker {w} {k} {v!r}" for w, (k, v) in enumerate(outcomes))
                error = next((v for k, v in outcomes if k == "raised"), None)
                raise LockstepError(f"Some workers wait for others for ever: {state}") from error
            answers = self._serve(values)

    def _resume(self, exchange: Exchange[T], answer: Any) -> tuple[str, Any]:
        try:
            if isinstance(answer, CollectiveError):
                return "asked", exchange.throw(answer)
            return "asked", exchange.send(answer)
        except StopIteration as end:
            return "returned", end.value
        except Exception as error:
            return "raised", error

    def _serve(self, requests: list[Request]) -> list[Any]:
        starts = [request.collective for request in requests if isinstance(request, Start)]
        waits = [self._number_of(r.collective) for r in requests if isinstance(r, InFlight)]
        others = [request for request in requests if not isinstance(request, Start | InFlight)]
        if len(requests) not in (len(starts), len(waits), len(others)):
            raise LockstepError(f"Workers ask for different things: {requests}")
        if len(set(waits)) > 1:
            raise LockstepError(f"Workers wait for different collectives: {sorted(set(waits))}")
        if starts:
            self._begin(starts)
            return [InFlight(collective, _wait) for collective in starts]
        return self._finish(waits[0] if waits else self._begin(others))

    def _number_of(self, collective: Collective) -> int:
        for number, started in self._started.items():
            if any(each is collective for each, _ in started):
                return number
        raise LockstepError(f"Workers wait for {collective.purpose}, which is not in flight")

    def _begin(self, collectives: Sequence[Collective]) -> int:
        traced = [
            Traced(type(c).__name__, c.purpose, tuple(c.buffer.shape), c.buffer.dtype)
            for c in collectives
        ]
        if any(t != traced[0] for t in traced) or len({c.source for c in collectives}) > 1:
            raise LockstepError(f"Workers ask for different collectives: {traced}")
        try:
            collectives[0].require_workers(len(collectives))
        except ValueError as error:
            raise LockstepError(f"{traced[0]}: {error}") from error
        number = len(self._trace)
        self._trace.append(traced[0])
        self._started[number] = [(c, c.buffer.clone()) for c in collectives]
        for collective in collectives:
            _poison_(collective.buffer)
        return number

    def _finish(self, number: int) -> list[Any]:
        started = self._started.pop(number)
        for worker, (collective, _) in enumerate(started):
            pair = collective.buffer, _poison_(torch.empty_like(collective.buffer))
            if not is_fake(pair[0]) and not torch.equal(
                *(each.reshape(-1).view(torch.uint8) for each in pair)
            ):
                raise LockstepError(
                    f"Worker {worker} wrote to its buffer while {self._trace[number]} was in flight"
                )
        if number == self._fail_at:
            purpose = self._trace[number].purpose
            return [CollectiveError(f"injected failure of {purpose}") for _ in started]
        buffers = [handed_over for _, handed_over in started]
        answers = started[0][0].combine(buffers)
        if started[0][0].writes_buffer:
            pairs = zip(started, answers, strict=True)
            return [collective.buffer.copy_(answer) for (collective, _), answer in pairs]
        for collective, handed_over in started:
            collective.buffer.copy_(handed_over)
        return [answer.clone() for answer in answers]


def _wait() -> Tensor:
    raise LockstepError("An answer is there once all workers have yielded what is in flight")


def _poison_(buffer: Tensor) -> Tensor:
    """Fills a buffer that is in flight with what nobody could take for a result."""
    is_float = buffer.is_floating_point()
    return buffer.fill_(torch.nan if is_float else torch.iinfo(buffer.dtype).max)
