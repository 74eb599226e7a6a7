"""PowerSGD: rank-r compression by one warm-started step of power iteration.

Source: Vogels, Karimireddy, Jaggi: "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization", NeurIPS 2019, arXiv 1905.13727. Algorithm 1, whose lines are marked.

Legend. b matrices of equal shape lie in one batch; every line below serves the whole batch. Small
ones may share a cell, padded with zeros to one shape (`low_rank.cells`), which changes nothing::

    M        [b, n, m]   the worker's own corrected gradients Δ_w
    Q        [b, r, m]   the paper's Q, transposed: M Q is `M @ Q.mT` here. Stored by rows because
                         that is how all products read and write memory in order.
    P        [b, n, r]   M Q, later its mean over the workers
    P_hat    [b, n, r]   P with orthonormal columns
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Gradients, Placement
from efsgd.algorithms.low_rank.products import LowRank, LowRankAggregator, views
from efsgd.algorithms.low_rank.reading import Factor, read_factors
from efsgd.algorithms.reading import Reading, Transcript
from efsgd.layout import Blocks, Layout
from efsgd.wire.collectives import AllReduceMean, Exchange, Start


class PowerIteration(LowRankAggregator):
    """Algorithm 1 for the matrices of one layout: compress and aggregate.

    The vectors of the layout (biases, norms, control words) travel in the buffer of the first
    all-reduce, so that a step makes two in all.

    Attributes:
        queries: the warm-started Q of each batch, [b, r, m]; changed by `commit_` alone.

    Args:
        layout: the plan; the level of an entry is its rank.
        placement: dtype and device of factors and buffers.
        options: those of `LowRankAggregator`.
    """

    shows_nonfinite = True  # what is not finite in M is found in P = M Q, or in the mean Q

    def __init__(self, layout: Layout, placement: Placement, **options: Any) -> None:
        super().__init__(layout, placement, **options)
        # What is handed to the two collectives: [control words, vectors, P] and [Q].
        self.P_buffer = self._zeros(self._P_shapes, head=layout.vector_floats)
        self.Q_buffer = self._zeros(self._Q_shapes)
        self.vectors = self.P_buffer[: layout.vector_floats]
        self.P_flat = self.P_buffer[layout.vector_floats :]
        self._P = self.cells.P.targets(self.P_flat)
        self._Q = self.cells.Q.targets(self.Q_buffer)
        # This worker's own Q, which line 9 of Algorithm 2 needs while the mean is on its way.
        self._local_buffer = self._zeros(self._Q_shapes)
        self._queries_buffer = self._zeros(self._Q_shapes)
        self.queries = views(self._queries_buffer, self._Q_shapes)
        self._is_ahead = False
        if self.shows_nonfinite:
            batches = [layout.batches[k] for k in self.passes.served]
            self.added_ahead = frozenset(entry.index for b in batches for entry in b.entries)

    def add_ahead_(
        self, deltas: Blocks, errors: Blocks | None, gradients: Gradients, scale: float, step: int
    ) -> None:
        """Line 7 of Algorithm 2 in one pass with line 3, where that is native."""
        self._is_ahead = False
        if self.added_ahead:
            queries = self._normalized_queries(step)
            self.passes.lines_7_and_3(deltas, errors, gradients, scale, queries, self._P)
            self._is_ahead = True

    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[LowRank]:
        """Lines 3 to 6, and line 7 as far as sending: (P̂, Q_w), the mean Q in flight."""
        cells, matrices = self.cells, self.cells.M.of(deltas.flat)
        is_ahead, self._is_ahead = self._is_ahead and not self.abstains, False
        done = self.passes.served if is_ahead else frozenset[int]()
        with self.phases("Alg. 1, line 3: P = M Q"):
            queries = self._normalized_queries(step) if len(done) < len(matrices) else []
            for k, Q in enumerate(queries):
                if k not in done:
                    torch.bmm(matrices[k], Q.mT, out=self._P[k])  # Alg. 1, line 3
            cells.P.put_(self._P, self.P_flat)
        with self.phases("Alg. 1, line 4: all-reduce P"):
            yield AllReduceMean(self.P_buffer, "vectors and P (Alg. 1, line 4)")  # Alg. 1, line 4
        with self.phases("Alg. 1, line 5: orthogonalize P"):
            P_hats = cells.of_each_P(orthogonalize, self.P_flat)  # Alg. 1, line 5
        with self.phases("Alg. 1, line 6: Q = M^T P"):
            done = self.passes.line_6(deltas, P_hats, self.Q_buffer, self._local_buffer)
            for k, (M, P_hat, Q) in enumerate(zip(matrices, P_hats, self._Q, strict=True)):
                if k not in done:
                    torch.bmm(P_hat.mT, M, out=Q)  # Alg. 1, line 6
            cells.Q.put_(self._Q, self.Q_buffer)
            if len(done) < len(matrices):
                self._local_buffer.copy_(self.Q_buffer)
        local_Q = cells.Q.of(self._local_buffer)
        if not self._Q:
            return self._low_rank_of_cells(P_hats, local_Q)
        mean = yield Start(AllReduceMean(self.Q_buffer, "Q (Alg. 1, line 7)"))  # Alg. 1, line 7
        return self._low_rank_of_cells(P_hats, local_Q, in_flight=mean)

    def aggregate(self, local: LowRank) -> Exchange[LowRank]:
        """Line 7's answer and line 8: (P̂, Q), the same on every worker."""
        if local.in_flight is not None:
            with self.phases("Alg. 1, line 7: all-reduce Q"):
                yield local.in_flight
        Q = self.cells.Q.of(self.Q_buffer)
        return self._low_rank_of_cells(local.P_hat, Q)  # Alg. 1, line 8

    def _normalized_queries(self, step: int) -> list[Tensor]:
        """The cells of the Q that a step starts from, in the memory of the Q that it will send.

        The scale of Q's columns does not matter to P̂: they are brought to where P is finite.
        """
        queries = self._queries_buffer if self.warm_start else self._draw_queries(self.seed, step)
        scales = scales_of(self.cells.largest_of_columns(queries))
        torch.mul(queries, self.cells.spread_over_columns(scales), out=self.Q_buffer)
        return self.cells.Q.of(self.Q_buffer)

    def commit_(self, absent: frozenset[int] = frozenset()) -> None:
        """Makes the averaged Q of the last exchange the next step's Q.

        A column that is exactly zero (a layer without gradient, a matrix of lower rank) keeps its
        last value instead: from a zero column nothing could ever be learned again. So do `absent`
        parameters.
        """
        is_zero = self.cells.largest_of_columns(self.Q_buffer) == 0
        keep = self.cells.spread_over_columns(is_zero)
        for batch, kept in zip(self.layout.batches, views(keep, self._Q_shapes), strict=True):
            for position, matrix in enumerate(batch.matrices if absent else ()):
                if matrix.owner in absent:
                    kept[position] = True
        torch.where(keep, self._queries_buffer, self.Q_buffer, out=self._queries_buffer)

    def state(self) -> dict[int, dict[str, Tensor]]:
        """For each compressed parameter, {"q": its warm-started Q [m, r]}, a live view.

        Of a stack of matrices the Q of all, [..., m, r].
        """
        return {
            entry.index: {"q": query.mT}
            for batch, queries in zip(self.layout.batches, self.queries, strict=True)
            for entry, query in batch.split(queries)
        }

    def public(self) -> Sequence[Tensor]:
        """Q, unless each step draws its own."""
        return self.queries if self.warm_start else ()

    def read(self, said: Transcript) -> dict[int, Reading]:
        """P_w = M Q and Q_w = M^T P̂, where P̂ is of the mean of all P."""
        head = self.layout.vector_floats
        P = self._P_views(said.sent[0][head:])
        P_mean = said.answers[0][head:] if said.answers else None
        Q = views(said.sent[1], self._Q_shapes) if len(said.sent) > 1 else None
        return self._read_factors(said, P, P_mean, Q)

    def _read_factors(
        self,
        said: Transcript,
        P: Sequence[Tensor],
        P_mean: Tensor | None,
        Q: Sequence[Tensor] | None,
    ) -> dict[int, Reading]:
        """What a worker's P and Q say, and the mean P, flat; of a step that has failed, P alone."""
        queries = said.public or views(self._draw_queries(self.seed, said.step), self._Q_shapes)
        factors = [Factor(P, [normalize_columns(query.mT) for query in queries])]
        product = None
        if P_mean is not None and Q is not None:
            own = self._zeros(self._P_shapes).copy_(P_mean)
            # As in the step: in other company the last bits of a decomposition may be others.
            P_hats = self.cells.P.of_batches(self.cells.of_each_P(orthogonalize, own))
            factors.append(Factor([own.mT for own in Q], P_hats, is_of_transposed=True))
            product = self._low_rank(P_hats, Q)
        return read_factors(self.layout, self.placement, factors, product)


def normalize_columns(matrices: Tensor) -> Tensor:
    """Scales each column by a power of two so that its largest entry lies in [0.5, 1).

    A power of two changes no digit, so whatever is computed from the result is bitwise
    the same for a matrix and for any power-of-two multiple of it, and squares and products
    neither overflow nor vanish. A column of zeros stays as it is.

    Example:
        >>> from efsgd.algorithms.powersgd import normalize_columns
        >>> normalize_columns(torch.tensor([[3.0, 1e-30], [4.0, 0.0]]))[:, 0]
        tensor([0.3750, 0.5000])
    """
    return matrices * scales_of(matrices.abs().amax(dim=-2, keepdim=True))


def scales_of(largest: Tensor) -> Tensor:
    """The powers of two that bring the largest entries of columns to [0.5, 1); of 0 any."""
    # The power must itself be a normal number, at both ends of the dtype's range.
    limit = math.frexp(torch.finfo(largest.dtype).max)[1] - 2
    bounded = largest.clamp(2.0**-limit, 2.0 ** (limit - 1))
    return torch.frexp(bounded).mantissa / bounded  # exact


def orthogonalize(matrices: Tensor) -> Tensor:
    """Orthonormal columns that span at least the columns of each matrix.

    What Gram-Schmidt gives in exact arithmetic, by Householder's QR decomposition of columns that
    were brought to one scale. Zero and linearly dependent columns are replaced by some unit
    vectors orthogonal to the others, so the result is orthonormal for every finite input, and
    nothing is ever divided by zero.

    Source: PowerSGD (arXiv 1905.13727), Algorithm 1, line 5.

    Args:
        matrices: [..., n, r] with r <= n, float32 or float64. Not modified.
    """
    n, r = matrices.shape[-2:]
    if r > n:
        raise ValueError(
            f"Invalid shape {tuple(matrices.shape)}: {r} orthonormal columns need at least {r} "
            f"rows. Clip the rank to min(n, m, rank)."
        )
    Q, R = torch.linalg.qr(normalize_columns(matrices))
    # Householder leaves the signs to chance; Gram-Schmidt's columns point along the given ones.
    signs = R.diagonal(dim1=-2, dim2=-1).signbit()
    orthonormal: Tensor = torch.where(signs.unsqueeze(-2), -Q, Q)
    return orthonormal
