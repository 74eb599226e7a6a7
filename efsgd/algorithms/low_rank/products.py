"""Matrices as products of two thin factors, which are multiplied out where they are used.

Source: Vogels, Karimireddy, Jaggi: "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization", NeurIPS 2019, arXiv 1905.13727. Algorithm 1, lines 10 and 11.

Legend. b matrices of equal shape lie in one batch::

    M        [b, n, m]   matrices that are compressed
    P        [b, n, r]   left factors; P_hat where their columns are orthonormal
    Q        [b, r, m]   right factors, transposed: stored by rows because that is how all products
                         read and write memory in order
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Aggregator, Compressed, Placement, subtract_
from efsgd.algorithms.low_rank.cells import FactorCells
from efsgd.algorithms.low_rank.chunks import Chunks
from efsgd.algorithms.low_rank.factors import initial_query
from efsgd.algorithms.low_rank.fusion import Fusion
from efsgd.algorithms.low_rank.native.passes import Passes
from efsgd.algorithms.low_rank.packing import Cells, Packed
from efsgd.layout import Batch, Blocks, Elementwise, Layout
from efsgd.wire.collectives import InFlight

# What is multiplied out at once on a CPU: 2 MiB in float32. Large enough that starting an operation
# costs little beside it, small enough to be in the cache still when the next operation reads it.
FLOATS_AT_ONCE = 2**19
# Unlike sums, products gain by chunks that stay in a core's own cache.
FLOATS_OF_A_PRODUCT = 2**16


class LowRankAggregator(Aggregator):
    """What aggregators have in common whose results are products P Q^T.

    Args:
        layout: the plan; the level of an entry is its rank.
        placement: dtype and device of factors and buffers.
        seed: with `warm_start=False`, the seed from which factors are drawn at every step.
        warm_start: whether a step starts from the factors of the step before it.
        fusion: multiplies products of small rank out where they are used; None: never.
        is_native: whether there are native `passes`, for what they can do.
    """

    def __init__(
        self,
        layout: Layout,
        placement: Placement,
        *,
        seed: int = 0,
        warm_start: bool = True,
        fusion: Fusion | None = None,
        is_native: bool = False,
    ) -> None:
        super().__init__(layout, placement)
        self.seed, self.warm_start, self._fusion = seed, warm_start, fusion
        self._dtype, self._device = dtype, device = placement.dtype, placement.device
        self._P_shapes = [(len(b.matrices), b.rows, rank_of(b)) for b in layout.batches]
        self._Q_shapes = [(len(b.matrices), rank_of(b), b.columns) for b in layout.batches]
        at_once = 64 * FLOATS_AT_ONCE if placement.saves_launches else FLOATS_AT_ONCE
        row = max((batch.columns for batch in layout.batches), default=0)
        size = max(row, min(at_once, layout.matrix_floats))
        self._scratch = torch.empty(size, dtype=dtype, device=device)
        P, Q = (torch.empty(_floats(s), device="meta") for s in (self._P_shapes, self._Q_shapes))
        self.passes = Passes.of(layout, self._scratch) if is_native else Passes(layout, {})
        # Where products are fused, matrices have kernels of their own.
        packs = placement.saves_launches and fusion is None and not self.passes.are_native
        factors = self._P_views(P), P, views(Q, self._Q_shapes), Q
        self.cells = FactorCells(layout, *factors, device, packs_matrices=packs)

    @property
    def numerics(self) -> str:
        """Either "native", or "compiled", where products may be fused, or "eager"."""
        is_eager = self._fusion is None
        return "native" if self.passes.are_native else "eager" if is_eager else "compiled"

    def prepare(
        self,
        function: Elementwise,
        operands: Sequence[Mapping[int, Tensor]],
        options: Mapping[str, Any],
    ) -> None:
        """Compiles what a step will need; if that fails, nothing is fused."""
        for batch in self.layout.batches if self._fusion is not None else ():
            shapes = (batch.rows, rank_of(batch)), (rank_of(batch), batch.columns)
            P, Q = (torch.zeros(s, dtype=self._dtype, device=self._device) for s in shapes)
            M = torch.empty(batch.rows, batch.columns, dtype=P.dtype, device="meta")
            for entry in batch.entries:
                first, *_ = entry.matrices()  # all others are like it
                own = [first.of(each[entry.index]) for each in operands if entry.index in each]
                if self._fusion is None or not own:
                    continue
                prepare = functools.partial(self._fusion.prepare, factors=(P, Q))
                is_ready = prepare(function, operands=own, options=options)
                if P.is_cpu and not is_aligned(batch, P.dtype):  # see `LowRank.subtract_from_`
                    is_ready = prepare(subtract_, operands=[M], options={}) and is_ready
                self._fusion = self._fusion if is_ready else None

    def _draw_queries(self, seed: int, step: int) -> Tensor:
        """A Q for each matrix that nothing is known of yet: Algorithm 1, line 1."""
        drawn = self._zeros(self._Q_shapes)
        factors = zip(self.layout.batches, views(drawn, self._Q_shapes), strict=True)
        for batch, queries in factors:
            for own, matrix in zip(queries, batch.matrices, strict=True):
                shape = (batch.columns, rank_of(batch))
                own.copy_(initial_query(seed, matrix.number, *shape, step=step).mT)
        return drawn

    def _zeros(self, shapes: Sequence[Sequence[int]], head: int = 0) -> Tensor:
        """One buffer for tensors of these shapes, after a head, and behind it the zero of cells."""
        floats = head + _floats(shapes)
        return torch.zeros(floats + 1, dtype=self._dtype, device=self._device)[:floats]

    def _P_views(self, buffer: Tensor) -> list[Tensor]:
        """The P of each batch, in a buffer; one column after the other where that is faster."""
        found = views(buffer, self._P_shapes)
        for position, (b, n, r) in enumerate(self._P_shapes):
            if r >= 4 and is_aligned(self.layout.batches[position], self._dtype):
                found[position] = found[position].view(b, r, n).mT
        return found

    def _low_rank(
        self, P: Sequence[Tensor], Q: Sequence[Tensor], in_flight: InFlight | None = None
    ) -> LowRank:
        """Of the factors of each batch."""
        own = self.layout, self._scratch, self._fusion
        is_chunked = not self.placement.saves_launches
        return LowRank(*own, P, Q, in_flight, None, is_chunked, self.passes)

    def _low_rank_of_cells(
        self, P: Sequence[Tensor], Q: Sequence[Tensor], in_flight: InFlight | None = None
    ) -> LowRank:
        return dataclasses.replace(self._low_rank(P, Q, in_flight), cells=self.cells.M)


@dataclass(frozen=True)
class LowRank(Compressed):
    """The compressed representation (P̂, Q) of matrices, not yet multiplied out.

    In Algorithm 1 the columns of P̂ are orthonormal; nothing here relies on it.

    Attributes:
        layout: whose matrices these are.
        scratch: memory for the chunks that are multiplied out.
        fusion: multiplies out where the product is used, without `scratch`; None: never.
        P_hat: [b, n, r] for each cell.
        Q: [b, r, m] for each cell (the paper's Q, transposed).
        in_flight: where a factor is one worker's own: its mean, on its way.
        cells: of the matrices; None: each batch is one.
        is_chunked: whether products are subtracted in chunks that stay in a cache: on CPUs.
        passes: native ones, for what they can do; None: there are none.
    """

    layout: Layout
    scratch: Tensor
    fusion: Fusion | None
    P_hat: Sequence[Tensor]
    Q: Sequence[Tensor]
    in_flight: InFlight | None = None
    cells: Cells | None = None
    is_chunked: bool = True
    passes: Passes | None = None

    def decompress_with_(
        self, function: Elementwise, *operands: Mapping[int, Tensor], **options: Any
    ) -> None:
        """Hands P̂Q^T to `function`, a few rows or matrices at a time."""
        if self.passes is not None and self.passes.are_native:
            is_done = self.passes.lines_11_to_13(self.P_hat, self.Q, function, operands, options)
            operands = tuple({i: x for i, x in o.items() if i not in is_done} for o in operands)
        chunks = Chunks(self.scratch, function, operands, options)
        for numbers, P_hat, Q, packed in self._factors():
            batches = [self.layout.batches[number] for number in numbers]
            if packed is not None:
                if any(entry.index in operands[0] for each in batches for entry in each.entries):
                    values = chunks.memory(packed.floats)
                    packed.unpacked(torch.bmm(P_hat, Q), out=values)
                    for batch, part in zip(
                        batches, values.split([batch.floats for batch in batches]), strict=True
                    ):
                        chunks.add(batch, part.view(-1, batch.rows, batch.columns))
                continue
            batch, done = batches[0], set[int]()
            if self.fusion is not None:
                for position, matrix in enumerate(batch.matrices):
                    index, factors = matrix.owner, (P_hat[position], Q[position])
                    own = [matrix.of(each[index]) for each in operands if index in each]
                    if own and self.fusion.apply_(function, *factors, own, options):
                        done.add(position)
            for matrices, rows in batch.chunks(operands[0].keys(), self.scratch.numel(), done):
                shape = (matrices.stop - matrices.start, rows.stop - rows.start, batch.columns)
                values = chunks.memory(math.prod(shape)).view(shape)
                torch.bmm(P_hat[matrices, rows], Q[matrices], out=values)  # Alg. 1, line 11
                chunks.add(batch, values, matrices.start, rows)
        chunks.hand_over()

    def subtract_from_(self, blocks: Blocks) -> None:
        """Subtracts P̂Q^T from each matrix of `blocks` (modified in place).

        In the product itself, except where rows are not aligned: there it is multiplied out, or
        fused.
        """
        fused: dict[int, Tensor] = {}
        is_done = () if self.passes is None else self.passes.line_9(blocks, self.P_hat, self.Q)
        for numbers, P_hat, Q, packed in self._factors():
            if numbers[0] in is_done:
                continue
            if packed is not None:
                packed.subtract_(torch.bmm(P_hat, Q), blocks.flat)
                continue
            batch, M = self.layout.batches[numbers[0]], blocks.batches[numbers[0]]
            views = {entry.index: blocks.views[entry.index] for entry in batch.entries}
            is_direct = not self.is_chunked or is_aligned(batch, M.dtype)
            if not is_direct and self.fusion is not None:
                fused |= views
                continue
            floats = FLOATS_OF_A_PRODUCT if is_direct else self.scratch.numel()
            for matrices, rows in batch.chunks(views, floats if self.is_chunked else batch.floats):
                own, factors = M[matrices, rows], (P_hat[matrices, rows], Q[matrices])
                if is_direct:
                    own.baddbmm_(*factors, alpha=-1)
                else:
                    values = self.scratch[: own.numel()].view(own.shape)
                    own.sub_(torch.bmm(*factors, out=values))
        if fused:
            self.decompress_with_(subtract_, fused)

    def squared_norms(self, wanted: Container[int]) -> list[Tensor]:
        """The traces of (P^T P)(Q^T Q), whichever of the factors is orthonormal."""
        found = []
        for numbers, P, Q, _ in self._factors():
            left, right = P.mT.double() @ P.double(), Q.double() @ Q.mT.double()  # [b, r, r]
            norms = (left * right).sum(dim=(1, 2))
            batches = [self.layout.batches[number] for number in numbers]
            owners = (matrix.owner for batch in batches for matrix in batch.matrices)
            pairs = zip(owners, norms.unbind(), strict=True)
            found += [norm for owner, norm in pairs if owner in wanted]
        return found

    def _factors(self) -> Iterator[tuple[Sequence[int], Tensor, Tensor, Packed | None]]:
        """For each cell the numbers of its batches, P̂ and Q, and how it is packed, if it is."""
        for number, (P_hat, Q) in enumerate(zip(self.P_hat, self.Q, strict=True)):
            if self.cells is None:
                yield [number], P_hat, Q, None
            else:
                yield self.cells.members[number], P_hat, Q, self.cells.packed(number)


def adopt_(
    kept: Sequence[Tensor],
    means: Sequence[Tensor],
    layout: Layout,
    absent: Container[int],
    dim: int = -1,
) -> None:
    """Keeps averaged factors for the next step (modified in place).

    A column that is exactly zero (a layer without gradient, a matrix of lower rank) keeps its last
    value instead: from a zero column nothing could ever be learned again. So do `absent`
    parameters. Columns lie along `dim`.
    """
    for batch, own, mean in zip(layout.batches, kept, means, strict=True):
        keep = (mean == 0).all(dim=dim, keepdim=True)
        for position, matrix in enumerate(batch.matrices):
            if matrix.owner in absent:
                keep[position] = True
        torch.where(keep, own, mean, out=own)


def _floats(shapes: Sequence[Sequence[int]]) -> int:
    return sum(map(math.prod, shapes))


def is_aligned(batch: Batch, dtype: torch.dtype) -> bool:
    """Whether every row of a matrix begins at a multiple of 32 bytes, as vector units like it.

    What is faster then and what is not: docs/benchmarks.md, "Choices within a step".
    """
    return batch.columns * dtype.itemsize % 32 == 0


def rank_of(batch: Batch) -> int:
    """The rank of a batch, its level."""
    return cast(int, batch.level)


def views(buffer: Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    """Tensors of these shapes, one after the other at the head of a buffer."""
    parts = buffer.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
