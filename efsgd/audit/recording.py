"""Copies of what workers hand to collectives, and what is read from them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.error_feedback import Outcome
from efsgd.algorithms.reading import Packet
from efsgd.audit.observed import Message
from efsgd.audit.records import BucketPart, PacketPart, Record
from efsgd.checks import plain, require_integer
from efsgd.engine.plan import Plan
from efsgd.wire.collectives import AllReduceMean, Collective, Exchange, intercept


class Recording:
    """What was seen while something was observed; made by `observe`.

    Iterating gives all messages, in the order in which they were sent. It goes on being readable
    once it is closed.

    Attributes:
        max_bytes: how much is kept. The oldest messages are dropped for new ones.
        nbytes: how much is kept now: copies of buffers, of answers, and of what all workers know.
        dropped: how many messages were dropped.
    """

    def __init__(
        self, workers: Container[int] | None, steps: Container[int] | None, max_bytes: int
    ) -> None:
        self._workers, self._steps = workers, steps
        self.max_bytes, self.nbytes, self.dropped = max_bytes, 0, 0
        self._kept: deque[Record] = deque()
        self._ends: list[Callable[[], None]] = []
        self._failure: Exception | None = None

    # ---- what was seen --------------------------------------------------------------------------

    def messages(self, *, worker: int | None = None, step: int | None = None) -> list[Message]:
        """What workers have sent: the threat model of someone who sees a worker's messages.

        Who sees these knows the algorithm, its settings and seed, and the averages.

        Args:
            worker: whose messages; None: of all that were recorded.
            step: of which step; None: of all. A step that was skipped or has failed, and the one
                that took its place, have the same number.

        Returns:
            One for each worker and step, in the order in which they were sent.

        Raises:
            RuntimeError: there was not enough memory for copies.
        """
        self._require_whole()
        return [record.message() for record in self._records(worker, step)]

    def averages(self, *, step: int | None = None) -> list[Message]:
        """The averages of what workers have sent: the threat model of someone who sees no more.

        For example behind secure aggregation; an all-reduce is none. What `measure` is given is to
        be the mean of the workers' gradients.

        Args:
            step: of which step; None: of all.

        Returns:
            One for each step; their `worker` is None.

        Raises:
            ValueError: the compressor's payloads are gathered: nothing of them is averaged.
            RuntimeError: there was not enough memory for copies.
        """
        self._require_whole()
        found: dict[tuple[int, int], Record] = {}
        counts = Counter[tuple[int, int]]()
        for record in self._records(None, step):
            counts[record.step, record.worker] += 1
            found.setdefault((record.step, counts[record.step, record.worker]), record)
        return [record.message(averages=True) for record in found.values()]

    def __iter__(self) -> Iterator[Message]:
        self._require_whole()
        for record in self._records(None, None):
            yield record.message()

    def __len__(self) -> int:
        return len(self._kept)

    def _records(self, worker: int | None, step: int | None) -> list[Record]:
        return [
            record
            for record in self._kept
            if worker in (None, record.worker) and step in (None, record.step)
        ]

    def _require_whole(self) -> None:
        if self._failure is not None:
            raise RuntimeError(
                f"What was sent could not be copied ({self._failure}), and is not known as a "
                f"whole. Record fewer workers or steps."
            ) from self._failure

    # ---- while it is open -----------------------------------------------------------------------

    def close(self) -> None:
        """Ends the observation; what was recorded is kept."""
        while self._ends:
            self._ends.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def begin(self, step: int, worker: int) -> Record | None:
        """A new record, if this worker's messages of this step are wanted."""
        is_wanted = self._workers is None or worker in self._workers
        if not is_wanted or not (self._steps is None or step in self._steps):
            return None
        self._kept.append(Record(step, worker))
        return self._kept[-1]

    def keep(self, record: Record, place: list[Tensor], tensor: Tensor) -> None:
        """Copies a tensor to a place in a record, and drops what is too much."""
        if record.is_dropped:
            return
        try:
            place.append(self._copy(tensor))
        except RuntimeError as error:  # other workers are waiting, so it is raised afterwards
            self._failure = error
            return
        record.nbytes += tensor.nbytes
        self.nbytes += tensor.nbytes
        while self.nbytes > self.max_bytes:
            oldest = self._kept.popleft()
            oldest.is_dropped = True
            self.nbytes -= oldest.nbytes
            self.dropped += 1

    @staticmethod
    def _copy(tensor: Tensor) -> Tensor:
        return tensor.detach().clone()

    def attach(self, sender: Any) -> None:
        """Listens to an optimizer, or to a stage of a pipeline."""
        if hasattr(sender, "watch"):
            listener = _StepListener(self)
            self._ends += [sender.listen(listener), sender.watch(listener.note_applied)]
        elif hasattr(sender, "listen"):
            self._ends.append(sender.listen(_LinkListener(self)))
        else:
            self.close()
            raise TypeError(
                f"Invalid optimizer: {type(sender).__name__} exchanges no gradients. Must be an "
                f"optimizer of efsgd, a GradientAverager, a PrivateOptimizer, a CompressedStage, "
                f"or a list of them; of a wrapper, pass what it wraps."
            )


class _StepListener:
    """Listens to one optimizer."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._record: Record | None = None

    def __call__(
        self, plan: Plan, bucket: Bucket, step: int, exchange: Exchange[Outcome]
    ) -> Exchange[Outcome]:
        aggregator, keep = bucket.aggregator, self._recording.keep
        if bucket is plan.buckets[0]:
            self._record = self._recording.begin(step, aggregator.placement.worker)
        record = self._record
        if record is None:
            return exchange
        part = BucketPart(aggregator, {info.index: info.name for info in plan.infos})
        record.parts.append(part)
        for tensor in aggregator.public():
            keep(record, part.public, tensor)

        def outgoing(collective: Collective) -> None:
            part.is_averaged = part.is_averaged and isinstance(collective, AllReduceMean)
            keep(record, part.sent, collective.buffer)

        return intercept(exchange, outgoing, lambda answer: keep(record, part.answers, answer))

    def note_applied(self, _: object) -> None:
        """Is called for steps that are applied, each time before it is."""
        if self._record is not None:
            self._record.is_applied = True


class _LinkListener:
    """Listens to one stage of a pipeline."""

    def __init__(self, recording: Recording) -> None:
        self._recording, self._step = recording, -1
        self._record: Record | None = None

    def __call__(self, packet: Packet) -> None:
        if packet.step != self._step:
            self._step = packet.step
            self._record = self._recording.begin(packet.step, packet.worker)
        if self._record is not None:
            self._record.is_applied = True
            part = PacketPart(packet)
            self._record.parts.append(part)
            self._recording.keep(self._record, part.sent, packet.buffer)


def observe(
    optimizer: Any,
    *,
    workers: Container[int] | None = None,
    steps: Container[int] | None = None,
    max_bytes: int = 2**30,
) -> Recording:
    """Records what a worker hands to the collectives of its steps, until it is closed.

    What is recorded are copies of the very buffers, and of the answers; nothing is computed again,
    no bit of the training changes, and nothing is written to disk. While nothing is observed it
    costs nothing.

    Args:
        optimizer: of this package, or a `GradientAverager` or `PrivateOptimizer`; a list of them
            where the workers are in one thread (`efsgd.testing.lockstep`); or a
            `CompressedStage`, whose messages are activations and gradients of activations.
        workers: whose messages are recorded, for example `{0}` or `range(2)`; a process sees its
            own alone. None: of all.
        steps: the numbers of the steps that are recorded, from 0; None: all.
        max_bytes: how many bytes are kept at most, the latest.

    Returns:
        The recording, a context manager.

    Raises:
        TypeError: `optimizer` exchanges no gradients.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.audit import observe
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = PowerSGDOptimizer(
        ...     model.parameters(), lr=0.1, momentum_form="sgd", rank=2
        ... )
        >>> with observe(optimizer, steps=range(1)) as recording:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.ones(8, 64)).square().mean().backward()
        ...         optimizer.step()
        >>> (message,) = recording
        >>> [(each.kind, [list(v.shape) for v in each.values]) for each in message.parameters]
        [('low rank', [[32, 2], [64, 2]]), ('clear', [[32]])]
    """
    require_integer("max_bytes", max_bytes, 1, remedy="2**30 keeps 1 GiB.")
    recording = Recording(workers, steps, plain(max_bytes))
    for each in optimizer if isinstance(optimizer, Sequence) else [optimizer]:
        recording.attach(each)
    return recording
