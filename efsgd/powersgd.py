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

import functools
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from efsgd.blocks import Batch, Blocks, Elementwise, Layout
from efsgd.collectives import AllReduceMean, Exchange, InFlight, Start
from efsgd.fusion import Fusion
from efsgd.orthogonalization import normalize_columns, orthogonalize
from efsgd.phases import Phases
from efsgd.query import initial_query

__all__ = ["LowRank", "PowerIteration", "subtract_"]

# What is multiplied out at once on a CPU: 2 MiB in float32. Large enough that starting an operation
# costs little beside it, small enough to be in the cache still when the next operation reads it.
FLOATS_AT_ONCE = 2**19
# Unlike sums, products gain by pieces that stay in a core's own cache.
FLOATS_OF_A_PRODUCT = 2**16


class PowerIteration:
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
        self.layout, self.seed, self.warm_start = layout, seed, warm_start
        self.phases = Phases()
        P_shapes, Q_shapes = [], []
        for batch in layout.batches:
            b, r = len(batch.entries), _rank(batch)
            P_shapes.append((b, batch.rows, r))
            Q_shapes.append((b, r, batch.columns))

        def buffer(shapes: Sequence[Sequence[int]], head: int = 0) -> Tensor:
            return torch.zeros(head + sum(map(math.prod, shapes)), dtype=dtype, device=device)

        # What is handed to the two collectives: [control words, vectors, P] and [Q].
        self.P_buffer = buffer(P_shapes, head=layout.vector_floats)
        self.Q_buffer = buffer(Q_shapes)
        self.vectors = self.P_buffer[: layout.vector_floats]
        self._P = _views(self.P_buffer[layout.vector_floats :], P_shapes)
        for position, (b, n, r) in enumerate(P_shapes):
            # The same memory one column after the other, where that is faster.
            if r >= 4 and _is_aligned(layout.batches[position], dtype):
                self._P[position] = self._P[position].view(b, r, n).mT
        self._Q = _views(self.Q_buffer, Q_shapes)
        # This worker's own Q, which line 9 of Algorithm 2 needs while the mean is on its way.
        self._local_buffer = buffer(Q_shapes)
        self._local_Q = _views(self._local_buffer, Q_shapes)
        self.queries = _views(buffer(Q_shapes), Q_shapes)
        at_once = FLOATS_AT_ONCE if device.type == "cpu" else 64 * FLOATS_AT_ONCE
        sizes = [max(batch.columns, min(at_once, batch.floats)) for batch in layout.batches]
        self._scratch = torch.empty(max(sizes, default=0), dtype=dtype, device=device)
        self._fusion = fusion

    @property
    def rounding(self) -> str:
        """Either "compiled", where products may be fused, or "uncompiled"."""
        return "uncompiled" if self._fusion is None else "compiled"

    def prepare(
        self,
        function: Elementwise,
        operands: Sequence[Mapping[int, Tensor]],
        options: Mapping[str, Any],
    ) -> None:
        """Compiles what a step will need; if that fails, nothing is fused."""
        for batch, P, Q in zip(self.layout.batches, self._P, self._Q, strict=True):
            M = torch.empty(batch.rows, batch.columns, dtype=P.dtype, device="meta")
            for position, entry in enumerate(batch.entries):
                own = [operand[entry.index] for operand in operands if entry.index in operand]
                if self._fusion is None or not own:
                    continue
                prepare = functools.partial(
                    self._fusion.prepare, factors=(P[position], Q[position])
                )
                is_ready = prepare(function, operands=own, options=options)
                if P.is_cpu and not _is_aligned(batch, P.dtype):  # see `LowRank.subtract_from_`
                    is_ready = prepare(subtract_, operands=[M], options={}) and is_ready
                self._fusion = self._fusion if is_ready else None

    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[LowRank]:
        """Lines 3 to 6, and line 7 as far as sending.

        Args:
            deltas: M, the worker's own matrices. Not modified.
            step: the step's number, from which Q is drawn with `warm_start=False`.

        Returns:
            (P̂, Q_w): P̂ the same on every worker, Q_w this worker's own, the mean in flight.
        """
        queries = self.queries if self.warm_start else self._draw(step)
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

    def _low_rank(
        self, P_hat: Sequence[Tensor], Q: Sequence[Tensor], in_flight: InFlight | None = None
    ) -> LowRank:
        return LowRank(self.layout, self._scratch, self._fusion, P_hat, Q, in_flight)

    def commit_(self, absent: frozenset[int] = frozenset()) -> None:
        """Makes the averaged Q of the last exchange the next step's Q.

        A column of Q that is exactly zero (a layer without gradient, a matrix of lower rank)
        keeps its last value instead: from a zero column nothing could ever be learned again.

        Args:
            absent: parameters that take no part in the step and keep their Q.
        """
        for batch, query, Q in zip(self.layout.batches, self.queries, self._Q, strict=True):
            keep = (Q == 0).all(dim=-1, keepdim=True)  # [b, r, 1]
            for position, entry in enumerate(batch.entries):
                if entry.index in absent:
                    keep[position] = True
            torch.where(keep, query, Q, out=query)

    def state(self) -> dict[int, dict[str, Tensor]]:
        """For each compressed parameter, {"q": its warm-started Q [m, r]}, a live view."""
        return {
            entry.index: {"q": query[position].mT}
            for batch, query in zip(self.layout.batches, self.queries, strict=True)
            for position, entry in enumerate(batch.entries)
        }

    def _draw(self, step: int) -> list[Tensor]:
        drawn = [torch.empty_like(query) for query in self.queries]
        for batch, query in zip(self.layout.batches, drawn, strict=True):
            for position, entry in enumerate(batch.entries):
                shape = (batch.columns, _rank(batch))
                query[position] = initial_query(self.seed, entry.index, *shape, step=step).mT
        return drawn


@dataclass(frozen=True)
class LowRank:
    """The compressed representation (P̂, Q) of matrices, not yet multiplied out.

    Attributes:
        layout: whose matrices these are.
        scratch: memory for the pieces that are multiplied out.
        fusion: multiplies out where the product is used, without `scratch`; None: never.
        P_hat: [b, n, r] for each batch.
        Q: [b, r, m] for each batch (the paper's Q, transposed).
        in_flight: where Q is one worker's own: the mean Q, on its way.
    """

    layout: Layout
    scratch: Tensor
    fusion: Fusion | None
    P_hat: Sequence[Tensor]
    Q: Sequence[Tensor]
    in_flight: InFlight | None = None

    def decompress_with_(
        self, function: Elementwise, *operands: Mapping[int, Tensor], **options: Any
    ) -> None:
        """Hands P̂Q^T to `function`, a few rows or matrices at a time.

        See `efsgd.compressors.Compressed`.
        """
        for batch, P_hat, Q in zip(self.layout.batches, self.P_hat, self.Q, strict=True):
            done: set[int] = set()
            if self.fusion is not None:
                for position, index in enumerate(entry.index for entry in batch.entries):
                    own = [operand[index] for operand in operands if index in operand]
                    factors = P_hat[position], Q[position]
                    if own and self.fusion.apply_(function, *factors, own, options):
                        done.add(index)
            for matrices, rows in batch.pieces(operands[0].keys() - done, self.scratch.numel()):
                entries = batch.entries[matrices]
                shape = (len(entries), rows.stop - rows.start, batch.columns)
                values = self.scratch[: math.prod(shape)].view(shape)
                torch.bmm(P_hat[matrices, rows], Q[matrices], out=values)  # Alg. 1, line 11
                function(
                    [v.view(-1, *e.shape[1:]) for v, e in zip(values, entries, strict=True)],
                    *([operand[e.index][rows] for e in entries] for operand in operands),
                    **options,
                )

    def subtract_from_(self, blocks: Blocks) -> None:
        """Subtracts P̂Q^T from each matrix of `blocks` (modified in place).

        In the product itself, except where rows are not aligned: there, as in `decompress_with_`.
        """
        others: dict[int, Tensor] = {}
        factors = zip(self.P_hat, self.Q, strict=True)
        for batch, M, (P_hat, Q) in zip(self.layout.batches, blocks.batches, factors, strict=True):
            views = {entry.index: blocks.views[entry.index] for entry in batch.entries}
            if M.is_cpu and not _is_aligned(batch, M.dtype):
                others |= views
                continue
            floats = FLOATS_OF_A_PRODUCT if M.is_cpu else batch.floats
            for matrices, rows in batch.pieces(views, floats):
                M[matrices, rows].baddbmm_(P_hat[matrices, rows], Q[matrices], alpha=-1)
        self.decompress_with_(subtract_, others)

    def squared_norms(self, wanted: Container[int]) -> list[Tensor]:
        """Those of Q: the columns of P̂ are orthonormal."""
        found = []
        for batch, Q in zip(self.layout.batches, self.Q, strict=True):
            norms = torch.linalg.vector_norm(Q, dim=(1, 2), dtype=torch.float64).square()
            pairs = zip(batch.entries, norms.unbind(), strict=True)
            found += [norm for entry, norm in pairs if entry.index in wanted]
        return found


def subtract_(values: Sequence[Tensor], minuends: Sequence[Tensor]) -> None:
    """Subtracts each of `values` from its minuend (modified in place)."""
    for value, minuend in zip(values, minuends, strict=True):
        minuend.sub_(value)


def _is_aligned(batch: Batch, dtype: torch.dtype) -> bool:
    """Whether every row of a matrix begins at a multiple of 32 bytes, as vector units like it.

    What is faster then and what is not: docs/benchmarks.md, "Choices within a step".
    """
    return batch.columns * dtype.itemsize % 32 == 0


def _rank(batch: Batch) -> int:
    return cast(int, batch.level)


def _views(buffer: Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    parts = buffer.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
