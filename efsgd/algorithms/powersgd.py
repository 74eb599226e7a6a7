"""PowerSGD: rank-r compression by one warm-started step of power iteration.

Source: Vogels, Karimireddy, Jaggi: "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization", NeurIPS 2019, arXiv 1905.13727. Algorithm 1, whose lines are marked.

Legend. b matrices of equal shape lie in one batch; every line below serves the whole batch::

    M        [b, n, m]   the worker's own corrected gradients Δ_w
    Q        [b, r, m]   the paper's Q, transposed: M Q is `M @ Q.mT` here. Stored by rows because
                         that is how all products read and write memory in order.
    P        [b, n, r]   M Q, later its mean over the workers
    P_hat    [b, n, r]   P with orthonormal columns
"""

from __future__ import annotations

import torch
from torch import Tensor

from efsgd.algorithms.low_rank.fusion import Fusion
from efsgd.algorithms.low_rank.orthogonalization import normalize_columns, orthogonalize
from efsgd.algorithms.low_rank.products import LowRank, LowRankAggregator, adopt_, views
from efsgd.layout import Blocks, Layout
from efsgd.wire.collectives import AllReduceMean, Exchange, Start


class PowerIteration(LowRankAggregator):
    """Algorithm 1 for the matrices of one layout: compress and aggregate.

    The vectors of the layout (biases, norms, control words) travel in the buffer of the first
    all-reduce, so that a step makes two in all.

    Attributes:
        vectors: flat buffer [layout.vector_floats]; holds this worker's values when `compress`
            is called and their mean from Algorithm 1, line 4, on.
        queries: the warm-started Q of each batch, [b, r, m]; changed by `commit_` alone.
        shows_nonfinite: what is not finite in M is found in P = M Q, or in the mean Q.

    Args:
        layout: the plan; the level of an entry is its rank.
        dtype: of factors and buffers.
        device: of factors and buffers.
        seed: with `warm_start=False`, the seed from which Q is drawn at every step.
        warm_start: whether a step starts from the Q of the step before it.
        fusion: multiplies products of small rank out where they are used; None: never.
    """

    shows_nonfinite = True

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        *,
        seed: int = 0,
        warm_start: bool = True,
        fusion: Fusion | None = None,
    ) -> None:
        super().__init__(layout, dtype, device, fusion)
        self.seed, self.warm_start = seed, warm_start
        # What is handed to the two collectives: [control words, vectors, P] and [Q].
        self.P_buffer = self._zeros(self._P_shapes, head=layout.vector_floats)
        self.Q_buffer = self._zeros(self._Q_shapes)
        self.vectors = self.P_buffer[: layout.vector_floats]
        self._P = self._P_views(self.P_buffer[layout.vector_floats :])
        self._Q = views(self.Q_buffer, self._Q_shapes)
        # This worker's own Q, which line 9 of Algorithm 2 needs while the mean is on its way.
        self._local_buffer = self._zeros(self._Q_shapes)
        self._local_Q = views(self._local_buffer, self._Q_shapes)
        self.queries = views(self._zeros(self._Q_shapes), self._Q_shapes)

    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[LowRank]:
        """Lines 3 to 6, and line 7 as far as sending.

        Args:
            deltas: M, the worker's own matrices. Not modified.
            step: the step's number, from which Q is drawn with `warm_start=False`.

        Returns:
            (P̂, Q_w): P̂ the same on every worker, Q_w this worker's own, the mean in flight.
        """
        queries = self.queries if self.warm_start else self._draw_queries(self.seed, step)
        with self.phases("Alg. 1, line 3: P = M Q"):
            for M, Q, P in zip(deltas.batches, queries, self._P, strict=True):
                # The scale of Q's columns does not matter to P̂: bring it to where P is finite.
                torch.bmm(M, normalize_columns(Q.mT), out=P)  # Alg. 1, line 3
        with self.phases("Alg. 1, line 4: all-reduce P"):
            yield AllReduceMean(self.P_buffer, "vectors and P (Alg. 1, line 4)")  # Alg. 1, line 4
        with self.phases("Alg. 1, line 5: orthogonalize P"):
            P_hats = [orthogonalize(P) for P in self._P]  # Alg. 1, line 5
        with self.phases("Alg. 1, line 6: Q = M^T P"):
            for M, P_hat, Q in zip(deltas.batches, P_hats, self._Q, strict=True):
                torch.bmm(P_hat.mT, M, out=Q)  # Alg. 1, line 6
            self._local_buffer.copy_(self.Q_buffer)
        if not self._Q:
            return self._low_rank(P_hats, self._local_Q)
        mean = yield Start(AllReduceMean(self.Q_buffer, "Q (Alg. 1, line 7)"))  # Alg. 1, line 7
        return self._low_rank(P_hats, self._local_Q, in_flight=mean)

    def aggregate(self, local: LowRank) -> Exchange[LowRank]:
        """Line 7's answer and line 8: (P̂, Q), the same on every worker."""
        if local.in_flight is not None:
            with self.phases("Alg. 1, line 7: all-reduce Q"):
                yield local.in_flight
        return self._low_rank(local.P_hat, self._Q)  # Alg. 1, line 8

    def commit_(self, absent: frozenset[int] = frozenset()) -> None:
        """Makes the averaged Q of the last exchange the next step's Q.

        A column of Q that is exactly zero (a layer without gradient, a matrix of lower rank)
        keeps its last value instead: from a zero column nothing could ever be learned again.

        Args:
            absent: parameters that take no part in the step and keep their Q.
        """
        adopt_(self.queries, self._Q, self.layout, absent)

    def state(self) -> dict[int, dict[str, Tensor]]:
        """For each compressed parameter, {"q": its warm-started Q [m, r]}, a live view."""
        return {
            entry.index: {"q": query[position].mT}
            for batch, query in zip(self.layout.batches, self.queries, strict=True)
            for position, entry in enumerate(batch.entries)
        }
