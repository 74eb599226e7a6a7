"""What a compressor of tensors is to its aggregator, and what it is given as one tensor."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from efsgd.algorithms.reading import Reading, part_of
from efsgd.layout import Layout, Matrix
from efsgd.randomness import Draws, RowDraws
from efsgd.wire.payload import Field, require_tensors

#: What is sent for one tensor: its fields, in the order in which they were announced.
Payload = Sequence[Tensor]

# 1 MiB in float32: it stays in the cache from one operation to the next.
ELEMENTS_AT_ONCE = 2**18


class Operator(Protocol):
    """Compresses a tensor and decompresses it; see `efsgd.TensorCompressor`."""

    def fields(self, shape: torch.Size) -> Sequence[Field]: ...

    def compress(self, delta: Tensor, draws: Draws) -> Payload: ...

    def add_decompressed_(
        self, out: Tensor, payload: Payload, draws: Draws, alpha: float
    ) -> None: ...

    def takes_rows(self, shape: torch.Size) -> bool: ...

    def compress_rows(self, deltas: Tensor, draws: RowDraws) -> Payload: ...

    def add_decompressed_rows_(
        self, out: Tensor, payload: Payload, draws: RowDraws, alpha: float
    ) -> None: ...

    def read(self, payload: Payload, decompressed: Tensor, draws: Draws) -> Reading: ...

    @property
    def seed_of_draws(self) -> int: ...

    @property
    def takes_all_at_once(self) -> bool: ...


class Unit:
    """What one call compresses: tensors of one shape, or all of one level as one long tensor.

    A tensor is a parameter, or of a stack one matrix. `slices` are where the `matrices` lie in
    `Blocks.flat`, `numbers` those of their random numbers; see `Entry`. Several of one shape are
    `rows` of a payload whose fields are [rows, count], flat.
    """

    def __init__(
        self,
        operator: Operator,
        matrices: Sequence[Matrix],
        shape: tuple[int, ...],
        slices: Sequence[slice],
    ) -> None:
        self.operator, self.matrices, self.shape = operator, tuple(matrices), torch.Size(shape)
        self._is_joined = operator.takes_all_at_once
        self.rows = 1 if self._is_joined else len(matrices)
        self.numbers = tuple([matrix.number for matrix in matrices[: self.rows]])
        self._slices: list[slice] = []
        for own in slices:
            if self._slices and self._slices[-1].stop == own.start:
                own = slice(self._slices.pop().start, own.stop)
            self._slices.append(own)

    def fields(self) -> tuple[Field, ...]:
        """What is sent for it."""
        own = self.operator.fields(self.shape)
        if self.rows == 1:
            return tuple(own)
        return tuple(dataclasses.replace(each, count=self.rows * each.count) for each in own)

    def compress(self, flat: Tensor, draws: RowDraws) -> Payload:
        """What its tensors are compressed to."""
        if self.rows == 1:
            return self.operator.compress(self._of(flat).view(self.shape), draws[0])
        payload = self.operator.compress_rows(self._of(flat).view(-1, *self.shape), draws)
        require_tensors(payload)
        for field, value in zip(self.operator.fields(self.shape), payload, strict=False):
            if value.shape != (self.rows, field.count):
                raise ValueError(
                    f"Invalid result of {type(self.operator).__name__}.compress_rows: a field has "
                    f"shape {list(value.shape)} and must have {[self.rows, field.count]}."
                )
        return [value.reshape(-1) for value in payload]

    def read(
        self, flat: Tensor, payload: Payload, draws: RowDraws
    ) -> Iterator[tuple[Matrix, Reading]]:
        """What a payload, which `add_` has added to zeros, says of each of the matrices."""
        rows = self._of(flat).view(self.rows, *self.shape)
        fields = [value.view(self.rows, -1) for value in payload]
        for row, own in enumerate(rows):
            reading = self.operator.read([value[row] for value in fields], own, draws[row])
            if not self._is_joined:
                yield self.matrices[row], reading
                continue
            first = 0
            for matrix in self.matrices:
                yield matrix, part_of(reading, first, matrix.shape)
                first += math.prod(matrix.shape)

    def add_(self, flat: Tensor, payload: Payload, draws: RowDraws, alpha: float) -> None:
        """Adds alpha times the decompressed payload to its place (modified in place)."""
        out = self._of(flat)
        if self.rows == 1:
            own = out.view(self.shape)
            self.operator.add_decompressed_(own, payload, draws[0], alpha)
        else:
            own, fields = out.view(-1, *self.shape), [v.view(self.rows, -1) for v in payload]
            self.operator.add_decompressed_rows_(own, fields, draws, alpha)
        if len(self._slices) > 1:
            sizes = [each.stop - each.start for each in self._slices]
            for each, part in zip(self._slices, out.split(sizes), strict=True):
                flat[each] = part

    def _of(self, flat: Tensor) -> Tensor:
        """Its elements, flat: a view wherever they are contiguous."""
        parts = [flat[own] for own in self._slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def units(layout: Layout) -> list[Unit]:
    """All units of a layout, whose levels are operators."""
    found: list[Unit] = []
    together: dict[Any, list[tuple[Matrix, slice]]] = {}
    ends = 0
    for batch in layout.batches:
        operator: Any = batch.level
        placed = []
        for matrix in batch.matrices:
            placed.append((matrix, slice(ends, ends + math.prod(matrix.shape))))
            ends = placed[-1][1].stop
        if operator.takes_all_at_once:
            together.setdefault(operator, []).extend(placed)
            continue
        for shape, run in itertools.groupby(placed, key=lambda pair: pair[0].shape):
            pairs = list(run)
            size = rows_at_once(operator, torch.Size(shape))
            for first in range(0, len(pairs), size):
                matrices, slices = zip(*pairs[first : first + size], strict=True)
                found.append(Unit(operator, matrices, shape, slices))
    for operator, pairs in together.items():
        matrices, slices = zip(*pairs, strict=True)
        total = sum(own.stop - own.start for own in slices)
        found.append(Unit(operator, matrices, (total,), slices))
    return found


def rows_at_once(operator: Operator, shape: torch.Size) -> int:
    """How many tensors of a shape it is given in one call."""
    return max(1, ELEMENTS_AT_ONCE // shape.numel()) if operator.takes_rows(shape) else 1
