"""How much of a tensor is sent: a share of its elements, or as much as PowerSGD would send."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Claims
from efsgd.algorithms.operators import Payload
from efsgd.checks import require_integer, require_number
from efsgd.compressors.tensor_compressor import TensorCompressor
from efsgd.layout import matrix_shape
from efsgd.randomness import Draws, RowDraws
from efsgd.wire.payload import Field


def floats_of_rank(shape: Sequence[int], rank: int) -> int:
    """What PowerSGD of this rank sends of a tensor: min(rank·(n + m), n·m) numbers.

    The tensor is seen as the matrix [n, m], n its first dimension. Of a vector that is all.

    Source: Vogels, Karimireddy, Jaggi: "PowerSGD", NeurIPS 2019, arXiv 1905.13727, whose
    comparison with other compressors gives all of them this budget.

    Example:
        >>> from efsgd.compressors.budget import floats_of_rank
        >>> floats_of_rank((64, 3, 3, 3), 2), floats_of_rank((64,), 2)
        (182, 64)
    """
    n, m = matrix_shape(shape)
    return min(rank * (n + m), n * m)


@dataclass(frozen=True)
class BudgetCompressor(TensorCompressor):
    """What compressors have in common that send some elements of a tensor as they are.

    Subclasses write `compress` and `add_decompressed_`, and for rows `compress_rows` and
    `add_decompressed_rows_`. They are given either the share of the
    elements that is sent, or the rank of a PowerSGD that sends as many floats.
    """

    density: float | None = None
    rank: int | None = None

    def __post_init__(self) -> None:
        density, rank = self.density, self.rank
        if (density is None) == (rank is None):
            raise ValueError(
                f"Invalid density and rank: {density!r} and {rank!r}. Must be one of them, not "
                f"both and not none; set the other to None."
            )
        if density is not None:
            small = "0.01 sends one element in a hundred."
            require_number("density", density, above=0, most=1, remedy=small)
        if rank is not None:
            require_integer("rank", rank, 1)

    def count(self, shape: Sequence[int]) -> int:
        """How many elements of a tensor of this shape are sent."""
        if self.rank is not None:
            return floats_of_rank(shape, self.rank)
        assert self.density is not None
        return max(1, int(self.density * math.prod(shape)))

    def compresses(self, shape: Sequence[int]) -> bool:
        """Whether fewer elements are sent than there are; otherwise all are, uncompressed."""
        return self.count(shape) < math.prod(shape)

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return (Field(self.count(shape)),)

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        out = payload[0].new_zeros(shape)
        self.add_decompressed_(out, payload, draws, 1.0)
        return out

    def decompress_rows(self, payload: Payload, shape: torch.Size, draws: RowDraws) -> Tensor:
        out = payload[0].new_zeros(len(payload[0]), *shape)
        self.add_decompressed_rows_(out, payload, draws, 1.0)
        return out

    def sent_share(self, shape: Sequence[int]) -> float:
        """The part of a tensor's elements that is sent: 1 where it is not compressed."""
        return self.count(shape) / math.prod(shape) if self.compresses(torch.Size(shape)) else 1.0


@dataclass(frozen=True)
class DrawnCompressor(BudgetCompressor):
    """What compressors have in common that draw the elements they send, the same on every worker.

    Positions need not be sent, so values are averaged. Subclasses write `compress` and
    `add_decompressed_`.
    """

    seed: int = 0

    averages: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_integer("seed", self.seed, 0)

    def claims(self) -> Claims:
        """It is averaged and linear; each element is sent with the same probability."""
        return Claims(averages=True, is_random=True, contraction=self.sent_share, linear=True)
