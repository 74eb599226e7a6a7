"""PowerSGD with one all-reduce per step: power iteration from the right and the left, by turns.

Source: the two halves of PowerSGD's power iteration (Vogels, Karimireddy, Jaggi, NeurIPS 2019,
arXiv 1905.13727), each in a step of its own, as in the authors' package github.com/epfml/powersgd.

Legend. b matrices of equal shape lie in one batch::

    M        [b, n, m]   the worker's own corrected gradients Δ_w
    P        [b, n, r]   M Q_hat, later its mean, which the next step starts from
    Q        [b, r, m]   M^T P_hat, transposed; later its mean, which the next step starts from
    P_hat    [b, n, r]   P with orthonormal columns
    Q_hat    [b, r, m]   Q with orthonormal rows

A step from the right multiplies by Q_hat, sends P and decodes to P Q_hat. A step from the left
multiplies by P_hat, sends Q and decodes to P_hat Q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Placement
from efsgd.algorithms.low_rank.products import LowRank, LowRankAggregator, adopt_, views
from efsgd.algorithms.low_rank.reading import Factor, read_factors
from efsgd.algorithms.powersgd import orthogonalize
from efsgd.algorithms.reading import Reading, Transcript
from efsgd.layout import Blocks, Layout
from efsgd.randomness import generator_of
from efsgd.wire.collectives import AllReduceMean, Exchange, Start

# Keeps the numbers that are drawn for P apart from those for Q.
_STREAM = 1


def initial_left(seed: int, index: int, n: int, r: int, *, step: int = 0) -> Tensor:
    """P for one matrix before anything is known of it: i.i.d. standard normal.

    Like `efsgd.algorithms.low_rank.factors.initial_query`, and independent of the first Q.
    """
    generator = generator_of(seed, index, step, _STREAM)
    return torch.randn(n, r, dtype=torch.float64, generator=generator, device="cpu")


class AlternatingPowerIteration(LowRankAggregator):
    """Half a step of power iteration for the matrices of one layout, in one all-reduce.

    What a step sends of M is its projection on the subspace that the last step of the other side
    has found. M changes in between, so the approximation is worse than that of Algorithm 1, which
    projects on a subspace of M's own mean; error feedback makes up for it.

    `queries` are the warm-started Q of each batch, `lefts` its P; `commit_` alone changes them.
    `start` is the number of the first compressed step, which multiplies from the right.
    """

    # Each element of M is a term in an element of P and in one of Q, and in floating point NaN and
    # infinity make every sum they enter NaN or infinite, even times 0.
    shows_nonfinite = True

    def __init__(
        self, layout: Layout, placement: Placement, *, start: int = 0, **options: Any
    ) -> None:
        super().__init__(layout, placement, **options)
        self._start, self._from_right = start, True
        # What is handed over: [control words, vectors, P], or Q in the place of P.
        head = layout.vector_floats
        P_floats, Q_floats = (sum(map(math.prod, s)) for s in (self._P_shapes, self._Q_shapes))
        longer = self._P_shapes if P_floats > Q_floats else self._Q_shapes
        buffer, local = self._zeros(longer, head), self._zeros(longer)
        self.vectors = buffer[:head]
        self._P_buffer, self._Q_buffer = buffer[: head + P_floats], buffer[: head + Q_floats]
        self._P = self._P_views(self._P_buffer[head:])
        self._Q = views(self._Q_buffer[head:], self._Q_shapes)
        # This worker's own, which the new errors need while the mean is on its way.
        self._local_P_buffer, self._local_Q_buffer = local[:P_floats], local[:Q_floats]
        self._local_P = self._P_views(self._local_P_buffer)
        self._local_Q = views(self._local_Q_buffer, self._Q_shapes)
        self.queries = views(self._zeros(self._Q_shapes), self._Q_shapes)
        self.lefts = views(self._zeros(self._P_shapes), self._P_shapes)

    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[LowRank]:
        """Multiplies from one side and sends the product: (P_w, Q̂) or (P̂, Q_w)."""
        self._from_right = self._multiplies_from_right(step)
        if self._from_right:
            queries = self.queries if self.warm_start else self._drawn(step)
            with self.phases("alternating: orthogonalize Q"):
                Q_hats = [orthogonalize(Q.mT).mT.contiguous() for Q in queries]
            with self.phases("alternating: P = M Q"):
                for M, Q_hat, P in zip(deltas.batches, Q_hats, self._P, strict=True):
                    torch.bmm(M, Q_hat.mT, out=P)
                self._local_P_buffer.copy_(self._P_buffer[self.layout.vector_floats :])
            mean = yield Start(AllReduceMean(self._P_buffer, "vectors and P (alternating)"))
            return self._low_rank(self._local_P, Q_hats, mean)
        lefts = self.lefts if self.warm_start else self._draw_lefts(step)
        with self.phases("alternating: orthogonalize P"):
            P_hats = [orthogonalize(P) for P in lefts]
        with self.phases("alternating: Q = M^T P"):
            for M, P_hat, Q in zip(deltas.batches, P_hats, self._Q, strict=True):
                torch.bmm(P_hat.mT, M, out=Q)
            self._local_Q_buffer.copy_(self._Q_buffer[self.layout.vector_floats :])
        mean = yield Start(AllReduceMean(self._Q_buffer, "vectors and Q (alternating)"))
        return self._low_rank(P_hats, self._local_Q, mean)

    def aggregate(self, local: LowRank) -> Exchange[LowRank]:
        """(P, Q̂) or (P̂, Q), the same on every worker."""
        assert local.in_flight is not None
        with self.phases("alternating: all-reduce P or Q"):
            yield local.in_flight
        if self._from_right:
            return self._low_rank(self._P, local.Q)
        return self._low_rank(local.P_hat, self._Q)

    def commit_(self, absent: frozenset[int] = frozenset()) -> None:
        """Makes the averaged factor of the last exchange the one that the next step starts from."""
        if self._from_right:
            adopt_(self.lefts, self._P, self.layout, absent, dim=-2)
        else:
            adopt_(self.queries, self._Q, self.layout, absent)

    def state(self) -> dict[int, dict[str, Tensor]]:
        """For each compressed parameter, {"q": Q [m, r], "p": P [n, r]}, live views.

        Of a stack of matrices those of all, [..., m, r] and [..., n, r].
        """
        factors = zip(self.layout.batches, self.queries, self.lefts, strict=True)
        return {
            entry.index: {"q": query.mT, "p": left}
            for batch, queries, lefts in factors
            for (entry, query), (_, left) in zip(
                batch.split(queries), batch.split(lefts), strict=True
            )
        }

    def public(self) -> Sequence[Tensor]:
        """Q and P, unless each step draws its own."""
        return (*self.queries, *self.lefts) if self.warm_start else ()

    def read(self, said: Transcript) -> dict[int, Reading]:
        """P_w = M Q̂ or Q_w = M^T P̂, where Q̂ and P̂ are of the last step's mean."""
        sent, count = said.sent[0][self.layout.vector_floats :], len(self.layout.batches)
        if self._multiplies_from_right(said.step):
            queries = said.public[:count] or self._drawn(said.step)
            P, Q_hats = self._P_views(sent), [orthogonalize(Q.mT).mT.contiguous() for Q in queries]
            factor, product = Factor(P, [Q.mT for Q in Q_hats]), self._low_rank(P, Q_hats)
        else:
            lefts = said.public[count:] or self._draw_lefts(said.step)
            Q, P_hats = views(sent, self._Q_shapes), [orthogonalize(P) for P in lefts]
            factor = Factor([own.mT for own in Q], P_hats, is_of_transposed=True)
            product = self._low_rank(P_hats, Q)
        return read_factors(self.layout, self.placement, [factor], product)

    def _multiplies_from_right(self, step: int) -> bool:
        # Where nothing is compressed, and before that starts, all steps are the same.
        return not self.layout.batches or (step - self._start) % 2 == 0

    def _drawn(self, step: int) -> list[Tensor]:
        return views(self._draw_queries(self.seed, step), self._Q_shapes)

    def _draw_lefts(self, step: int) -> list[Tensor]:
        drawn = [torch.empty_like(left) for left in self.lefts]
        for batch, left in zip(self.layout.batches, drawn, strict=True):
            for own, matrix in zip(left, batch.matrices, strict=True):
                own.copy_(initial_left(self.seed, matrix.number, *own.shape, step=step))
        return drawn
