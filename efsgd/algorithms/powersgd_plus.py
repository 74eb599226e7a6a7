"""PowerSGD+: PowerSGD whose subspace is found anew, by an SVD, at regular intervals.

Source: Xie, Chen, Yuan: "From PowerSGD to PowerSGD+: Low-Rank Gradient Compression for Distributed
Optimization with Convergence Guarantees", 2025, arXiv 2509.11254. Between two refreshes it is
Algorithm 1 of PowerSGD (arXiv 1905.13727).

Legend. b matrices of equal shape lie in one batch::

    M        [b, n, m]   the worker's own corrected gradients Δ_w; mean: their mean over the workers
    P_hat    [b, n, r]   the mean's first r left singular vectors
    Q        [b, r, m]   M^T P_hat, transposed; later its mean, from which the next step starts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Placement
from efsgd.algorithms.low_rank.products import rank_of
from efsgd.algorithms.powersgd import PowerIteration, normalize_columns, orthogonalize
from efsgd.algorithms.reading import Reading, Transcript, read_whole
from efsgd.algorithms.tensorwise import Dense
from efsgd.layout import Blocks, Layout
from efsgd.randomness import generator_of
from efsgd.wire.collectives import AllReduceMean, Exchange, Start

# Of a randomized SVD: columns beyond the rank, and steps of power iteration. Usual values, see
# Halko, Martinsson, Tropp, arXiv 0909.4061, sections 4.2 and 4.5.
_OVERSAMPLING = 8

_ITERATIONS = 2

# Keeps the numbers that are drawn here apart from those of the first Q.
_STREAM = 2


class RefreshedPowerIteration(PowerIteration):
    """Algorithm 1, with a refresh in the first compressed step and every `refresh_every` after it.

    At a refresh the workers average their whole matrices, so that the first buffer shows all that
    is not finite. Memory for that is taken for the one step. With `is_exact` the mean itself is the
    result, not its best approximation. `start` is the number of the first compressed step.
    """

    def __init__(
        self,
        layout: Layout,
        placement: Placement,
        *,
        refresh_every: int,
        start: int = 0,
        svd: str = "exact",
        is_exact: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(layout, placement, **options)
        self._every, self._start, self._svd, self._is_exact = refresh_every, start, svd, is_exact

    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[Any]:
        """Algorithm 1, or a refresh: (P̂, Q_w), the mean Q in flight, or M as a whole."""
        if not self._refreshes(step):
            return (yield from super().compress(deltas, step))
        mean = yield from self._average(deltas)
        with self.phases("PowerSGD+: SVD"):
            factors = zip(mean.batches, self._P_views(self.P_flat), strict=True)
            for batch, (matrices, P_hat) in zip(self.layout.batches, factors, strict=True):
                drawn = [generator_of(self.seed, M.number, step, _STREAM) for M in batch.matrices]
                generators = drawn if self._svd == "randomized" else None
                P_hat.copy_(leading_left_singular_vectors(matrices, rank_of(batch), generators))
        with self.phases("PowerSGD+: Q = M^T P"):
            P_hats = self.cells.P.of(self.P_flat)
            sources = self.cells.M.of((mean if self._is_exact else deltas).flat)
            for M, P_hat, Q in zip(sources, P_hats, self._Q, strict=True):
                torch.bmm(P_hat.mT, M, out=Q)
            self.cells.Q.put_(self._Q, self.Q_buffer)
            self._local_buffer.copy_(self.Q_buffer)
        if self._is_exact:
            return Whole(self._matrices(deltas.flat), mean=mean)
        in_flight = yield Start(AllReduceMean(self.Q_buffer, "Q (PowerSGD+, refresh)"))
        return self._low_rank_of_cells(P_hats, self.cells.Q.of(self._local_buffer), in_flight)

    def aggregate(self, local: Any) -> Exchange[Any]:
        """(P̂, Q), or the mean as a whole; the same on every worker."""
        if isinstance(local, Whole):
            return Dense(local.mean)
        return (yield from super().aggregate(local))

    def read(self, said: Transcript) -> dict[int, Reading]:
        """P_w and Q_w, or at a refresh M itself, which says all that Q_w could say."""
        if not self._refreshes(said.step):
            return super().read(said)
        return read_whole(self.layout, said.sent[0][self.layout.vector_floats :])

    def _refreshes(self, step: int) -> bool:
        return bool(self.layout.batches) and (step - self._start) % self._every == 0

    def _average(self, deltas: Blocks) -> Exchange[Blocks]:
        """The workers' mean of all matrices; that of the vectors, which ride along, is put back."""
        head = self.layout.vector_floats
        with self.phases("PowerSGD+: all-reduce M"):
            buffer = torch.cat([self.vectors, deltas.flat])
            yield AllReduceMean(buffer, "vectors and whole matrices (PowerSGD+, refresh)")
            self.vectors.copy_(buffer[:head])
        return self._matrices(buffer[head:])

    def _matrices(self, flat: Tensor) -> Blocks:
        return Blocks(self.layout, flat.dtype, flat.device, flat=flat)


@dataclass(frozen=True)
class Whole(Dense):
    """One worker's matrices, sent as they are; `mean` is that of all workers."""

    mean: Blocks = field(kw_only=True)


def leading_left_singular_vectors(
    matrices: Tensor, rank: int, generators: Sequence[torch.Generator] | None = None
) -> Tensor:
    """The left singular vectors, [b, n, r], of the largest singular values of matrices [b, n, m].

    Orthonormal for every finite matrix, also for zero. Elements that are not finite count as zero.
    With a generator for each matrix, on the CPU, by a randomized SVD (Halko, Martinsson, Tropp,
    arXiv 0909.4061, Algorithms 4.4 and 5.1); else exact, by LAPACK.
    """
    found = []
    for index, matrix in enumerate(matrices):  # one at a time, for the sake of memory
        # At one scale, so that nothing overflows or vanishes on the way.
        M = normalize_columns(matrix.reshape(-1, 1)).view_as(matrix)
        M.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        if generators is None:
            # A copy, since a view would keep all of U.
            found.append(torch.linalg.svd(M, full_matrices=False).U[:, :rank].clone())
        else:
            found.append(_randomized(M, rank, generators[index]))
    return torch.stack(found)


def _randomized(M: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    n, m = M.shape
    columns = min(n, m, rank + _OVERSAMPLING)
    drawn = torch.randn(m, columns, dtype=torch.float64, generator=generator, device="cpu")
    basis = orthogonalize(M @ drawn.to(M))
    for _ in range(_ITERATIONS):
        basis = orthogonalize(M @ orthogonalize(M.mT @ basis))
    found: Tensor = basis @ torch.linalg.svd(basis.mT @ M, full_matrices=False).U[:, :rank]
    return found
