"""Top K: the elements of largest magnitude, and where they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from efsgd.compressors.base import Claims
from efsgd.compressors.budget import BudgetCompressor, floats_of_rank, is_share
from efsgd.payload import Field, position_dtype
from efsgd.selection import largest
from efsgd.units import Draws, Payload

__all__ = ["TopK"]

SCOPES = ("tensor", "model")


@dataclass(frozen=True)
class TopK(BudgetCompressor):
    """Sends the k elements of largest magnitude, and their positions.

    Each worker has positions of its own, so payloads are gathered: what a worker receives grows
    with their number.

    Sources: Stich, Cordonnier, Jaggi: "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599;
    Vogels, Karimireddy, Jaggi: "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
    Optimization", NeurIPS 2019, arXiv 1905.13727, "Top K" in the comparison with other compressors.

    Attributes:
        density: which share of the elements is sent, above 0 and at most 1: k = max(1,
            int(density·numel)). May be set per parameter group.
        rank: in place of `density`, the rank of a PowerSGD that sends as many bytes. A value and
            its position take as many as two floats: k = max(1, r·(n + m) // 2) for a tensor that is
            seen as the matrix [n, m], r = min(n, m, rank). Tensors of at most r·(n + m) elements,
            such as vectors, are sent uncompressed. May be set per parameter group.
        scope: "tensor" selects k elements of each tensor, "model" those of all tensors of one
            group's settings together; it needs `density`. May be set per parameter group.

    Raises:
        ValueError: a setting is out of range, density and rank are both given, or none, or rank is
            given for the scope "model".

    Example:
        >>> from efsgd.compressors.top_k import TopK
        >>> TopK(density=0.01).payload_bytes([(64, 32), (64,)])  # 20 pairs, and one
        168
        >>> TopK(rank=2).payload_bytes([(64, 32), (64,)])  # 96 pairs, and a vector
        1024
    """

    scope: str = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in SCOPES:
            raise ValueError(f"Invalid scope: {self.scope!r}. Must be one of {list(SCOPES)}.")
        if self.scope == "model" and self.rank is not None:
            raise ValueError(
                f"Invalid rank: {self.rank!r}. Must be None for the scope 'model', since all "
                f"tensors together are no matrix; use density, or the scope 'tensor'."
            )

    @classmethod
    def from_compression(cls, compression: float, *, scope: str = "tensor") -> Self:
        """By the share of the bytes that is sent, half of which pay for positions.

        Source: the parameter `compression` of the code that came with arXiv 1905.13727.

        Args:
            compression: above 0 and at most 1, twice the density.
            scope: "tensor" or "model".

        Example:
            >>> from efsgd.compressors.top_k import TopK
            >>> TopK.from_compression(1 / 32)
            TopK(density=0.015625, rank=None, scope='tensor')
        """
        if not is_share(compression):
            raise ValueError(
                f"Invalid compression: {compression!r}. Must be a number above 0 and at most 1; "
                f"with 1 as many bytes are sent as there are."
            )
        return cls(density=compression / 2, scope=scope)

    @property
    def takes_all_at_once(self) -> bool:
        """For the scope "model"."""
        return self.scope == "model"

    def count(self, shape: Sequence[int]) -> int:
        """How many elements of a tensor of this shape are sent."""
        floats = super().count(shape)
        return floats if self.rank is None else max(1, floats // 2)

    def compresses(self, shape: Sequence[int]) -> bool:
        """Whether positions are sent with less than all; otherwise all are, uncompressed."""
        if self.scope == "model":
            return True
        shape = torch.Size(shape)
        sent = self.count(shape) if self.rank is None else floats_of_rank(shape, self.rank)
        return sent < shape.numel()

    def claims(self) -> Claims:
        """What is not sent is no larger than what is; of one tensor among many it may be all."""
        is_model = self.scope == "model"
        return Claims(
            averages=False, contraction=(lambda shape: 0.0) if is_model else self.sent_share
        )

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        """Values and positions."""
        k = self.count(shape)
        return Field(k), Field(k, position_dtype(shape.numel()))

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        """The values of largest magnitude, and their positions."""
        flat = delta.view(-1)
        positions = largest(flat, self.count(delta.shape))
        return flat[positions], positions.to(position_dtype(delta.numel()))

    def add_decompressed_(self, out: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        """Adds to the positions that were sent alone (`out` is modified in place)."""
        values, positions = payload
        out.view(-1).index_add_(0, positions, values, alpha=alpha)
