"""LQ-SGD: power iteration whose factors are sent as logarithmic codes.

Source: Li et al.: "LQ-SGD", 2025, arXiv 2506.17974; and for the lines that are marked, Algorithm 1
of PowerSGD (arXiv 1905.13727), which it builds on. What workers send is decoded and averaged before
P is made orthonormal. What a code misses of the local Q is in no worker's (P̂, Q_w), and so goes to
the errors, like all that the low rank misses.

Legend, as in `efsgd.algorithms.powersgd`. b matrices of equal shape lie in one batch::

    M        [b, n, m]   the worker's own corrected gradients Δ_w
    Q        [b, r, m]   the paper's Q, transposed
    P        [b, n, r]   M Q, later the mean over the workers of what its codes decode to
    P_hat    [b, n, r]   P with orthonormal columns
"""

from __future__ import annotations

from typing import Any

import torch

from efsgd.algorithms.interfaces import Placement
from efsgd.algorithms.low_rank.products import LowRank, rank_of, views
from efsgd.algorithms.powersgd import PowerIteration, orthogonalize
from efsgd.algorithms.quantization.coded_mean import GatheredMean, ScatteredMean
from efsgd.algorithms.quantization.log_quantizer import LogQuantizer
from efsgd.algorithms.reading import Reading, Transcript
from efsgd.layout import Blocks, Layout
from efsgd.wire.collectives import AllReduceMean, Exchange, Start

# Of the largest number of a dtype: so much of Q is sent at most, and the rest of it later, so that
# no product P̂Qᵀ overflows.
_LARGEST_PART = 2.0**-16


class QuantizedPowerIteration(PowerIteration):
    """Algorithm 1 for the matrices of one layout, with factors as codes.

    The vectors of the layout travel uncompressed, in an all-reduce of their own. If it `scatters`
    each worker averages a part of the factors; else each averages all.
    """

    shows_nonfinite = False  # codes show nothing

    def __init__(
        self,
        layout: Layout,
        placement: Placement,
        quantizer: LogQuantizer,
        *,
        scatters: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(layout, placement, **options)
        kind = ScatteredMean if scatters and layout.batches else GatheredMean
        self._P_mean, self._Q_mean = (
            kind(quantizer, sizes, placement) for sizes in factor_sizes(layout)
        )

    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[LowRank]:
        """Lines 3 to 6, and line 7 as far as sending: (P̂, Q_w), Q_w as its codes decode."""
        vectors = yield Start(AllReduceMean(self.vectors, "vectors"))
        if not self._Q:
            yield vectors
            return self._low_rank([], [])
        cells, matrices = self.cells, self.cells.M.of(deltas.flat)
        with self.phases("Alg. 1, line 3: P = M Q"):
            # A matrix has one scale, for which the columns of P must be of similar size.
            for M, Q, P in zip(matrices, self._normalized_queries(step), self._P, strict=True):
                torch.bmm(M, Q.mT, out=P)  # line 3
            cells.P.put_(self._P, self.P_flat)
            coded_P = self._P_mean.encode(self.P_flat.nan_to_num_())
        with self.phases("Alg. 1, line 4: average P"):
            what = "codes of P (Alg. 1, line 4)"
            in_flight = yield Start(self._P_mean.send(coded_P, what))
            yield vectors  # answers come in the order of the questions
            received = yield in_flight
            mean_P = yield from self._P_mean.mean(received, "mean P (Alg. 1, line 4)")
            self.P_flat.copy_(mean_P)  # line 4
        with self.phases("Alg. 1, line 5: orthogonalize P"):
            P_hats = cells.of_each_P(orthogonalize, self.P_flat)  # line 5
        with self.phases("Alg. 1, line 6: Q = M^T P"):
            for M, P_hat, Q in zip(matrices, P_hats, self._Q, strict=True):
                torch.bmm(P_hat.mT, M, out=Q)  # line 6
            cells.Q.put_(self._Q, self.Q_buffer)
            limit = torch.finfo(self._dtype).max * _LARGEST_PART
            coded_Q = self._Q_mean.encode(self.Q_buffer.nan_to_num_().clamp_(-limit, limit))
            self._local_buffer.copy_(self._Q_mean.decode(coded_Q))
        what = "codes of Q (Alg. 1, line 7)"
        in_flight = yield Start(self._Q_mean.send(coded_Q, what))  # line 7
        return self._low_rank_of_cells(P_hats, cells.Q.of(self._local_buffer), in_flight)

    def aggregate(self, local: LowRank) -> Exchange[LowRank]:
        """Line 7's answer and line 8: (P̂, Q), the same on every worker."""
        if local.in_flight is not None:
            with self.phases("Alg. 1, line 7: average Q"):
                received = yield local.in_flight
                what = "mean Q (Alg. 1, line 7)"
                mean_Q = yield from self._Q_mean.mean(received, what)
                self.Q_buffer.copy_(mean_Q)  # line 7
        return self._low_rank_of_cells(local.P_hat, self.cells.Q.of(self.Q_buffer))  # line 8

    def read(self, said: Transcript) -> dict[int, Reading]:
        """P_w and Q_w as their codes decode: M Q and M^T P̂ but for what codes miss."""
        if len(said.sent) < 2:
            return {}
        after = 1 + self._P_mean.collectives
        P_mean = self._P_mean.read_mean(said.answers[1:after])
        Q_flat = self._Q_mean.read(said.sent[after]) if len(said.sent) > after else None
        Q = None if Q_flat is None else views(Q_flat, self._Q_shapes)
        return self._read_factors(said, self._P_views(self._P_mean.read(said.sent[1])), P_mean, Q)


def factor_sizes(layout: Layout) -> tuple[list[int], list[int]]:
    """The numbers of elements of each P and of each Q, in the order in which they are sent."""
    ranks = [(batch, rank_of(batch)) for batch in layout.batches for _ in batch.matrices]
    return [b.rows * rank for b, rank in ranks], [b.columns * rank for b, rank in ranks]
