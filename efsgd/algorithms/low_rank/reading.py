"""What thin factors say of the matrices that they were made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Compressed, Placement, copy_
from efsgd.algorithms.reading import Reading
from efsgd.layout import Blocks, Layout


@dataclass(frozen=True)
class Factor:
    """A factor that was sent, and what matrices M [b, n, m] were multiplied by to make it.

    Attributes:
        sent: for each batch M `by`, [b, n, r], or M^T `by`, [b, m, r].
        by: for each batch, [b, m, r] or [b, n, r].
        is_of_transposed: whether it is M^T `by`.
    """

    sent: Sequence[Tensor]
    by: Sequence[Tensor]
    is_of_transposed: bool = False


def read_factors(
    layout: Layout, placement: Placement, factors: Sequence[Factor], product: Compressed | None
) -> dict[int, Reading]:
    """What factors say of each compressed parameter of a layout.

    `product` is what receivers make of them, None where a step has failed before they could.
    """
    blocks, found = Blocks(layout, placement.dtype, placement.device), {}
    if product is not None:
        product.decompress_with_(copy_, blocks.views)
    for position, batch in enumerate(layout.batches):
        split = [
            (batch.split(each.sent[position]), batch.split(each.by[position])) for each in factors
        ]
        for entry in batch.entries:
            pairs = [(next(sent)[1], next(by)[1]) for sent, by in split]
            measure = _Products(
                (*entry.shape[: entry.batch_dims], batch.rows, batch.columns),
                [by for _, by in pairs],
                [each.is_of_transposed for each in factors],
            )
            values = tuple(sent for sent, _ in pairs)
            found[entry.index] = Reading("low rank", values, measure, blocks.views[entry.index])
    return found


@dataclass(frozen=True)
class _Products:
    """The products of a candidate, seen as matrices of this shape, with the same factors."""

    shape: tuple[int, ...]
    by: Sequence[Tensor]
    is_of_transposed: Sequence[bool]

    def __call__(self, candidate: Tensor) -> tuple[Tensor, ...]:
        M, found = candidate.reshape(self.shape), []
        for by, is_of_transposed in zip(self.by, self.is_of_transposed, strict=True):
            dtype = torch.promote_types(M.dtype, by.dtype)
            found.append((M.mT if is_of_transposed else M).to(dtype) @ by.to(dtype))
        return tuple(found)
