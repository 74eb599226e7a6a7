"""Top K: the elements of largest magnitude, and where they are."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Claims
from efsgd.algorithms.operators import Payload
from efsgd.algorithms.reading import Reading, entries
from efsgd.checks import require_choice, require_number
from efsgd.compressors.budget import BudgetCompressor, floats_of_rank
from efsgd.layout import is_fake
from efsgd.randomness import Draws, RowDraws
from efsgd.wire.payload import Field, position_dtype

# Up to so many elements torch.topk is as fast.
FEW = 2**17
# From so many elements a threshold is guessed.
SAMPLES = 2**14
# What is looked through at once: 512 KiB in float32, which stays in the cache from one operation to
# the next.
AT_ONCE = 2**17


def largest(flat: Tensor, k: int) -> Tensor:
    """Positions, [k] int64 in ascending order, of the k elements of largest magnitude.

    Of equal ones any. torch.topk looks at every element several times, on a CPU. So a threshold is
    guessed from a sample, such that probably a few more than k are above it, and topk sees those
    alone. The result does not depend on the guess, and neither it nor the result on chance.
    """
    is_guessed = flat.device.type == "cpu" and flat.numel() > FEW and not is_fake(flat)
    threshold = _guess_threshold(flat, k) if is_guessed else None
    if threshold is None:
        return _top(flat, k)
    above = _where(flat, threshold, torch.gt)
    if len(above) >= k:
        return above[_top(flat[above], k)]
    # The threshold itself may be a value that is there many times: zero, for example.
    equal = _where(flat, threshold, torch.eq, limit=k - len(above))
    if len(above) + len(equal) == k:
        return torch.cat([above, equal]).sort().values
    return _top(flat, k)


def _top(flat: Tensor, k: int) -> Tensor:
    return torch.topk(flat.abs(), k, sorted=False).indices.sort().values


def _guess_threshold(flat: Tensor, k: int) -> Tensor | None:
    """A magnitude, [], that probably k elements exceed; None where that is no rare thing."""
    # An odd stride, so that a sample is not from few columns of a matrix.
    sample = flat[:: (flat.numel() // SAMPLES) | 1].abs()
    expected = k / flat.numel() * len(sample)
    # Four standard deviations of how many of the k are in a sample, and some where k is small.
    wanted = math.ceil(expected + 4 * math.sqrt(expected) + 4)
    if 4 * wanted > len(sample):
        return None
    return torch.topk(sample, wanted).values[-1]


def _where(
    flat: Tensor,
    threshold: Tensor,
    comparison: Callable[[Tensor, Tensor], Tensor],
    limit: int | None = None,
) -> Tensor:
    """Ascending positions, the first `limit`, whose magnitudes compare so with the threshold."""
    scratch = torch.empty(AT_ONCE, dtype=flat.dtype, device=flat.device)
    found: list[Tensor] = []
    total = 0
    for first in range(0, flat.numel(), AT_ONCE):
        part = flat[first : first + AT_ONCE]
        magnitudes = torch.abs(part, out=scratch[: len(part)])
        positions = comparison(magnitudes, threshold).nonzero().view(-1)
        found.append(positions.add_(first))
        total += len(positions)
        if limit is not None and total >= limit:
            break
    return torch.cat(found)[:limit]


SCOPES = ("tensor", "model")


@dataclass(frozen=True)
class TopK(BudgetCompressor):
    """Sends the k elements of largest magnitude, and their positions.

    Each worker has positions of its own, so payloads are gathered: what a worker receives grows
    with their number.

    Sources: Stich, Cordonnier, Jaggi: "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599;
    PowerSGD (arXiv 1905.13727), "Top K" in the comparison with others.

    Attributes:
        density: which share of the elements is sent, above 0 and at most 1: k = max(1,
            int(density·numel)). May be set per parameter group.
        rank: in place of `density`, the rank of a PowerSGD that sends as many bytes. A value and
            its position take as many as two floats: k = max(1, rank·(n + m) // 2) for a tensor that
            is seen as the matrix [n, m], n its first dimension. Tensors of at most rank·(n + m)
            elements, such as vectors, are sent uncompressed. May be set per parameter group.
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
        require_choice("scope", self.scope, SCOPES)
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
        whole = "With 1 as many bytes are sent as there are."
        require_number("compression", compression, above=0, most=1, remedy=whole)
        return cls(density=compression / 2, scope=scope)

    @property
    def takes_all_at_once(self) -> bool:
        return self.scope == "model"

    def count(self, shape: Sequence[int]) -> int:
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
        """The largest k of n elements have k/n of the squared norm, or more.

        Of one tensor among many, for the scope "model", nothing need be sent.
        """
        share = (lambda shape: 0.0) if self.scope == "model" else self.sent_share
        return Claims(averages=False, contraction=share)

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        k = self.count(shape)
        return Field(k), Field(k, position_dtype(shape.numel()))

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        flat = delta.view(-1)
        positions = largest(flat, self.count(delta.shape))
        return flat[positions], positions.to(position_dtype(delta.numel()))

    def takes_rows(self, shape: torch.Size) -> bool:
        return self.scope == "tensor" and shape.numel() <= FEW  # `largest` takes longer ones

    def compress_rows(self, deltas: Tensor, draws: RowDraws) -> Payload:
        rows = deltas.view(len(deltas), -1)
        positions = _top(rows, self.count(deltas.shape[1:]))
        return rows.gather(1, positions), positions.to(position_dtype(rows.shape[1]))

    def add_decompressed_rows_(
        self, out: Tensor, payload: Payload, draws: RowDraws, alpha: float
    ) -> None:
        values, positions = payload
        first = torch.arange(0, out.numel(), out[0].numel(), device=out.device).unsqueeze(1)
        where = (first + positions).view(-1)
        out.view(-1).index_add_(0, where, values.reshape(-1), alpha=alpha)

    def add_decompressed_(self, out: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        values, positions = payload
        out.view(-1).index_add_(0, positions, values, alpha=alpha)

    def read(self, payload: Payload, decompressed: Tensor, draws: Draws) -> Reading:
        return entries(decompressed, payload[1].long())
