"""What is kept of one step of one worker, and how it is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Aggregator
from efsgd.algorithms.reading import Packet, Reading, Transcript, read_vectors
from efsgd.audit.observed import Message, Observed
from efsgd.wire.collectives import leave_modes


class Part(ABC):
    """What was sent together, copied.

    Attributes:
        sent: buffers.
        answers: what came back.
    """

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.answers: list[Tensor] = []

    @abstractmethod
    def read(self, step: int, number: int, *, averages: bool = False) -> Iterator[Observed]:
        """What was sent says, or the answers by themselves; `number` is that of this part."""


class BucketPart(Part):
    """What was sent for one bucket of an optimizer; `names` are those of its parameters.

    Attributes:
        public: what all workers knew before.
        is_averaged: whether nothing but means were asked for so far.
    """

    def __init__(self, aggregator: Aggregator, names: Mapping[int, str]) -> None:
        super().__init__()
        self._aggregator, self._names = aggregator, names
        self.public: list[Tensor] = []
        self.is_averaged = True

    def read(self, step: int, number: int, *, averages: bool = False) -> Iterator[Observed]:
        """Of each parameter of the bucket."""
        sent = self.answers if averages else self.sent
        if averages and not self.is_averaged:
            raise ValueError(
                "There are no averages: payloads of this compressor are gathered, so that every "
                "worker is sent those of all others. Use messages()."
            )
        said = Transcript(step, self.public, sent, self.answers)
        layout, found = self._aggregator.layout, dict[int, Reading]()
        if sent:
            found |= read_vectors(layout, sent[0])
            found |= self._aggregator.read(said) if layout.batches else {}
        for entry in layout.entries:
            if entry.index in found:  # of a step that failed early, not all were sent
                name, shape = self._names[entry.index], torch.Size(entry.shape)
                yield observed(name, entry.index, shape, found[entry.index])


class PacketPart(Part):
    """One tensor that was sent over a link of a pipeline."""

    def __init__(self, packet: Packet) -> None:
        super().__init__()
        self._name, self._shape, self._read = packet.name, packet.shape, packet.read

    def read(self, step: int, number: int, *, averages: bool = False) -> Iterator[Observed]:
        """Of this one tensor."""
        if averages:
            raise ValueError("There are no averages over a link. Use messages().")
        yield observed(self._name, number, self._shape, self._read(self.sent[0]))


def observed(name: str, index: int, shape: torch.Size, reading: Reading) -> Observed:
    """A reading, with the name of what it is about."""
    return Observed(
        name=name,
        index=index,
        shape=shape,
        kind=reading.kind,
        values=reading.values,
        measure=reading.measure,
        decompressed=reading.decompressed,
    )


@dataclass
class Record:
    """What one worker sent in one step.

    Attributes:
        step: its number.
        worker: who.
        parts: what.
        is_applied: whether the step was.
        nbytes: of all copies.
        is_dropped: nothing more is kept for it.
    """

    step: int
    worker: int
    parts: list[Part] = field(default_factory=list)
    is_applied: bool = False
    nbytes: int = 0
    is_dropped: bool = False

    @leave_modes()
    def message(self, *, averages: bool = False) -> Message:
        """What the worker has sent, or what whoever sees answers alone has seen."""
        found, nbytes = list[Observed](), 0
        for number, part in enumerate(self.parts):
            found += part.read(self.step, number, averages=averages)
            nbytes += sum(each.nbytes for each in (part.answers if averages else part.sent))
        found.sort(key=lambda each: each.index)
        worker = None if averages else self.worker
        return Message(self.step, worker, tuple(found), self.is_applied, nbytes)
