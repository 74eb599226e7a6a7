"""Batches of many shapes as few cells, so that few operations serve them.

A cell is one batch, of which it is a view; or it is several, copied into one tensor and padded, by
an index that is made once. Zeros change nothing of what is computed from the rest: they add nothing
to a product, and Householder's reflections leave rows of zeros what they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

#: (matrices, rows, columns) of a batch, or of a cell.
Shape: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class Packing:
    """Which batches share a cell.

    Attributes:
        largest: a batch that has more elements has a cell of its own.
        padding: for each batch that has no cell of its own, a cell may have so much padding. As
            many elements cost about what the operations of one batch cost to start.
    """

    largest: int
    padding: int

    def cells(self, shapes: Sequence[Shape]) -> list[list[int]]:
        """The positions of the batches in each cell."""
        found: list[list[int]] = []
        shared: list[list[int]] = []
        for position, shape in enumerate(shapes):
            if _floats(shape) > self.largest:
                found.append([position])
                continue
            for cell in shared:
                own = [shapes[i] for i in (*cell, position)]
                excess = _floats(around(own)) - sum(map(_floats, own))
                if excess <= self.padding * len(own):
                    cell.append(position)
                    break
            else:
                shared.append([position])
                found.append(shared[-1])
        return found


#: On accelerators, where starting an operation takes as long as reading or writing megabytes.
FOR_LAUNCHES = Packing(largest=2**19, padding=2**19)
#: On CPUs, for factors.
FOR_CALLS = Packing(largest=2**14, padding=2**12)
#: A cell for each batch.
NONE = Packing(largest=-1, padding=0)


class Cells:
    """Cells of batches that lie in a flat buffer, one after the other.

    Args:
        batches: [b, x, y], views of `flat`.
        flat: a buffer; others that are laid out like it are given later.
        cells: the positions of the batches in each cell.
        fill: the place in the buffer of what padding is filled with.
    """

    def __init__(
        self,
        batches: Sequence[Tensor],
        flat: Tensor,
        cells: Sequence[Sequence[int]],
        fill: int,
        device: torch.device,
    ) -> None:
        self.members, self._sizes = cells, [_shape(batch) for batch in batches]
        self.shapes = [around([_shape(batches[i]) for i in cell]) for cell in cells]
        self._parts: list[_View | Packed] = []
        for cell, shape in zip(cells, self.shapes, strict=True):
            views = [
                _View(each.shape, each.stride(), int(each.storage_offset() - flat.storage_offset()))
                for each in (batches[i] for i in cell)
            ]
            is_view = len(cell) == 1
            self._parts.append(views[0] if is_view else Packed(views, shape, fill, device))

    def of(self, flat: Tensor) -> list[Tensor]:
        """The cells of a buffer: views, or packed copies."""
        return [part.of(flat) for part in self._parts]

    def targets(self, flat: Tensor) -> list[Tensor]:
        """Where cells are to be written, before `put_`: views, or memory of their own."""
        return [
            part.of(flat) if isinstance(part, _View) else flat.new_zeros(shape)
            for part, shape in zip(self._parts, self.shapes, strict=True)
        ]

    def put_(self, cells: Sequence[Tensor], flat: Tensor) -> None:
        """Writes what is no view to the buffer (modified in place)."""
        for part, cell in zip(self._parts, cells, strict=True):
            if isinstance(part, Packed):
                part.put_(cell, flat)

    def of_batches(self, cells: Sequence[Tensor]) -> list[Tensor]:
        """What lies in cells for each batch, views."""
        found = [torch.empty(0)] * len(self._sizes)
        for members, cell in zip(self.members, cells, strict=True):
            first = 0
            for i in members:
                b, x, y = self._sizes[i]
                found[i] = cell[first : first + b, :x, :y]
                first += b
        return found

    def packed(self, number: int) -> Packed | None:
        """How the batches of a cell are packed; None where it is a view of one."""
        part = self._parts[number]
        return part if isinstance(part, Packed) else None


@dataclass(frozen=True)
class _View:
    """Where a batch lies in a buffer."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.as_strided(self.size, self.stride, flat.storage_offset() + self.offset)

    def places(self) -> Tensor:
        count = self.size.numel()
        places = torch.arange(self.offset, self.offset + count, device="cpu")
        return places.as_strided(self.size, self.stride)


class Packed:
    """How several batches get into one padded tensor, and back."""

    def __init__(
        self, views: Sequence[_View], shape: Shape, fill: int, device: torch.device
    ) -> None:
        count, rows, columns = shape
        self._shape = shape
        taken = torch.full(shape, fill, device="cpu")
        cells = torch.arange(count * rows * columns, device="cpu").view(shape)
        kept, places, first = [], [], 0
        for view in views:
            b, x, y = view.size
            own = slice(first, first + b), slice(x), slice(y)
            taken[own] = view.places()
            kept.append(cells[own].reshape(-1))
            places.append(view.places().reshape(-1))
            first += b
        self._length = 1 + max(fill, *(view.offset + view.size.numel() - 1 for view in views))
        kind = torch.int32 if max(self._length, cells.numel()) < 2**31 else torch.int64
        self._taken = taken.view(-1).to(device, kind)
        self._kept = torch.cat(kept).to(device, kind)
        self._places = torch.cat(places).to(device)

    def of(self, flat: Tensor) -> Tensor:
        # What padding is filled with may lie behind the buffer.
        whole = flat.as_strided((self._length,), (1,), flat.storage_offset())
        return whole.index_select(0, self._taken).view(self._shape)

    @property
    def floats(self) -> int:
        """The number of elements without the padding."""
        return self._places.numel()

    def unpacked(self, cell: Tensor, out: Tensor | None = None) -> Tensor:
        """The elements of a cell without the padding, batch after batch."""
        return torch.index_select(cell.reshape(-1), 0, self._kept, out=out)

    def put_(self, cell: Tensor, flat: Tensor) -> None:
        """Writes the elements of a cell to a buffer (modified in place)."""
        flat.index_copy_(0, self._places, self.unpacked(cell))

    def subtract_(self, cell: Tensor, flat: Tensor) -> None:
        """Subtracts the elements of a cell from those of a buffer (modified in place)."""
        flat.index_add_(0, self._places, self.unpacked(cell), alpha=-1)


def around(shapes: Sequence[Shape]) -> Shape:
    """The shape of a cell for batches of these shapes."""
    return sum(s[0] for s in shapes), max(s[1] for s in shapes), max(s[2] for s in shapes)


def _floats(shape: Shape) -> int:
    return shape[0] * shape[1] * shape[2]


def _shape(batch: Tensor) -> Shape:
    b, x, y = batch.shape
    return b, x, y
