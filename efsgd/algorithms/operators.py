"""What a compressor of tensors is to its aggregator, and what it is given as one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from efsgd.algorithms.reading import Reading, part_of
from efsgd.layout import Layout, Matrix
from efsgd.randomness import Draws
from efsgd.wire.payload import Field

#: What is sent for one tensor: its fields, in the order in which they were announced.
Payload = Sequence[Tensor]


class Operator(Protocol):
    """Compresses a tensor and decompresses it; see `efsgd.TensorCompressor`."""

    def fields(self, shape: torch.Size) -> Sequence[Field]: ...

    def compress(self, delta: Tensor, draws: Draws) -> Payload: ...

    def add_decompressed_(
        self, out: Tensor, payload: Payload, draws: Draws, alpha: float
    ) -> None: ...

    def read(self, payload: Payload, decompressed: Tensor, draws: Draws) -> Reading: ...

    @property
    def seed_of_draws(self) -> int: ...

    @property
    def takes_all_at_once(self) -> bool: ...


class Unit:
    """What is compressed as one tensor: one parameter, or all of one level, one after the other.

    Of a stack it is one matrix. `slices` are where its `matrices` lie in `Blocks.flat`, `number` is
    that of the (first) matrix; see `Entry`.
    """

    def __init__(
        self,
        operator: Operator,
        matrices: Sequence[Matrix],
        shape: tuple[int, ...],
        slices: Sequence[slice],
    ) -> None:
        self.operator, self.matrices, self.shape = operator, tuple(matrices), torch.Size(shape)
        self.number = matrices[0].number
        self._slices: list[slice] = []
        for own in slices:
            if self._slices and self._slices[-1].stop == own.start:
                own = slice(self._slices.pop().start, own.stop)
            self._slices.append(own)

    def fields(self) -> tuple[Field, ...]:
        """What is sent for it."""
        return tuple(self.operator.fields(self.shape))

    def of(self, flat: Tensor) -> Tensor:
        """The tensor, a view wherever it is contiguous."""
        parts = [flat[own] for own in self._slices]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.shape)

    def read(
        self, flat: Tensor, payload: Payload, draws: Draws
    ) -> Iterator[tuple[Matrix, Reading]]:
        """What a payload, which `add_` has added to zeros, says of each of the matrices."""
        reading = self.operator.read(payload, self.of(flat), draws)
        if not self.operator.takes_all_at_once:
            yield self.matrices[0], reading
            return
        first = 0
        for matrix in self.matrices:
            yield matrix, part_of(reading, first, matrix.shape)
            first += math.prod(matrix.shape)

    def add_(self, flat: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        """Adds alpha times the decompressed payload to its place (modified in place)."""
        out = self.of(flat)
        self.operator.add_decompressed_(out, payload, draws, alpha)
        if len(self._slices) > 1:
            sizes = [own.stop - own.start for own in self._slices]
            for own, part in zip(self._slices, out.view(-1).split(sizes), strict=True):
                flat[own] = part


def units(layout: Layout) -> list[Unit]:
    """All units of a layout, whose levels are operators."""
    found, first = [], 0
    together: dict[Any, list[tuple[Matrix, slice]]] = {}
    for batch in layout.batches:
        operator: Any = batch.level
        for matrix in batch.matrices:
            own = slice(first, first + math.prod(matrix.shape))
            first = own.stop
            if operator.takes_all_at_once:
                together.setdefault(operator, []).append((matrix, own))
            else:
                found.append(Unit(operator, [matrix], matrix.shape, [own]))
    for operator, pairs in together.items():
        matrices, slices = [matrix for matrix, _ in pairs], [own for _, own in pairs]
        total = sum(own.stop - own.start for own in slices)
        found.append(Unit(operator, matrices, (total,), slices))
    return found
