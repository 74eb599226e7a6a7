"""What a compressor sends in a step, asked of the compressor itself: no formula stands here.

Its own exchange is run for one worker, on tensors that have shapes and no values, and what it asks
for is written down. All the other workers are taken to be like this one.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.error_feedback import exchange_gradients
from efsgd.algorithms.interfaces import Compressor, Placement
from efsgd.layout import Layout
from efsgd.planning.tensors import Trained
from efsgd.wire.collectives import Collective, run
from efsgd.wire.control_words import ControlWords

_CPU = torch.device("cpu")
#: So many steps stand for all, where not all are alike.
_STEPS = 1000


@dataclass(frozen=True)
class Message:
    """What one worker hands to a collective.

    Attributes:
        kind: name of the class of the collective.
        nbytes: of the worker's buffer.
    """

    kind: str
    nbytes: int


#: For each kind of step: how often it is taken, and what is sent in it.
Kinds: TypeAlias = list[tuple[float, tuple[Message, ...]]]


class Echo:
    """A transport whose other workers send what this one sends; nothing leaves the process.

    `messages` are those that were handed over.
    """

    worker = 0

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.messages: list[Message] = []

    def start(self, collective: Collective) -> Callable[[], Tensor]:
        """Answers at once."""
        buffer, kind = collective.buffer, type(collective).__name__
        self.messages.append(Message(kind, collective.nbytes))
        if kind == "AllGather":
            return lambda: buffer.unsqueeze(0).repeat(self.world_size, *[1] * buffer.dim())
        if kind == "AllToAll":
            return lambda: buffer[:1].expand(buffer.shape).contiguous()
        return lambda: buffer


@dataclass(frozen=True)
class Sending:
    """What a compressor sends for the tensors of a model.

    Attributes:
        compressor: the compressor.
        trained: the tensors.
    """

    compressor: Compressor
    trained: Trained
    _found: dict[int, Kinds] = field(default_factory=dict, repr=False, compare=False)
    _recorded: dict[tuple[int, int], tuple[int, tuple[Message, ...]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def gathers(self) -> bool:
        """Whether what a worker receives grows with the number of workers."""
        return not self.compressor.claims().averages

    def messages(self, workers: int) -> Kinds:
        """What one worker hands over in a step, for each kind of step: how often, and what."""
        if workers not in self._found:
            self._found[workers] = [
                (often, self._messages_of(step, workers)) for step, often in self._kinds.items()
            ]
        return self._found[workers]

    def nbytes(self, workers: int) -> float:
        """The bytes that one worker hands over in a step, in the mean over steps."""
        return sum(often * sum(m.nbytes for m in own) for often, own in self.messages(workers))

    def collectives(self, workers: int) -> float:
        """How many collectives a step has, in the mean over steps."""
        return sum(often * len(own) for often, own in self.messages(workers))

    @cached_property
    def _kinds(self) -> dict[int, float]:
        """A step of each kind, and the part of all steps that are of this kind."""
        settings = self.compressor.settings()
        kinds: list[Hashable] = [self.compressor.step_kind(k, settings) for k in range(_STEPS)]
        return {kinds.index(kind): n / _STEPS for kind, n in Counter(kinds).items()}

    def _messages_of(self, step: int, workers: int) -> tuple[Message, ...]:
        cache = self._recorded
        size = self.compressor.payload_bytes(self.trained.shapes, self.trained.dtype, step, workers)
        # Where the payload is the same, nothing but the control words can be another.
        if (step, size) not in cache:
            cache[step, size] = workers, tuple(self._record(step, workers))
        known, (first, *others) = cache[step, size]
        own, before = (ControlWords.count(len(self.trained.shapes), w) for w in (workers, known))
        more = (own - before) * self.trained.dtype.itemsize
        return (Message(first.kind, first.nbytes + more), *others)

    @cached_property
    def kept_bytes(self) -> int:
        """The bytes that error feedback and the compressor keep from step to step, and as scratch.

        With the momentum that is all that is kept beyond parameters and gradients.
        """
        with FakeTensorMode():
            bucket = self._bucket(2)
            sizes: dict[int, int] = {}
            for tensor in _tensors_in(bucket, set()):
                storage = tensor.untyped_storage()
                sizes[storage._cdata] = storage.nbytes()
            return sum(sizes.values())

    def _record(self, step: int, workers: int) -> list[Message]:
        transport = Echo(workers)
        with FakeTensorMode():
            # As a worker that cannot take part: the same is sent, and made-up code need not run.
            absent = dict.fromkeys(range(len(self.trained.shapes)))
            exchange = exchange_gradients(self._bucket(workers), absent, step, abstains="unable")
            run(exchange, transport)
        return transport.messages

    def _bucket(self, workers: int) -> Bucket:
        compressor, trained = self.compressor, self.trained
        own, count = {"start_compressing_at": 0, **compressor.settings()}, len(trained.shapes)
        entries = [compressor.entry(k, shape, own) for k, shape in enumerate(trained.shapes)]
        layout = Layout.plan(entries, ControlWords.count(count, workers))
        placement = Placement(trained.dtype, _CPU, 0, workers)
        aggregator = compressor.aggregator(layout, own, placement)
        words = ControlWords(range(count), workers, 0)
        return Bucket(layout, aggregator, words, trained.dtype, _CPU)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors that an object of this package holds."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _tensors_in(each, seen)
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors_in(each, seen)
    elif type(value).__module__.startswith("efsgd."):
        yield from _tensors_in(getattr(value, "__dict__", {}), seen)
