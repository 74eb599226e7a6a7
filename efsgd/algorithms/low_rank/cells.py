"""The matrices and factors of one layout, in the cells that each operation is given."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from efsgd.algorithms.low_rank.packing import FOR_CALLS, FOR_LAUNCHES, NONE, Cells, Packing
from efsgd.layout import Layout


class FactorCells:
    """Cells for products, and others for what needs the columns of P or of Q alone.

    Factors lie in buffers with one more zero behind them, which padding is made of.

    Attributes:
        M: cells of the matrices, in a buffer like that of `Blocks`. Their padding is no zeros, but
            finite where all elements are: it meets the zeros of P and Q alone.
        P: cells of the same batches.
        Q: cells of the same batches.

    Args:
        layout: the plan.
        P: [b, n, r] for each batch, views of `P_flat`; its memory is not looked at.
        Q: [b, r, m] for each batch, views of `Q_flat`.
        device: where the buffers are.
        packs_matrices: whether small matrices share cells as well; otherwise factors alone do.
    """

    def __init__(
        self,
        layout: Layout,
        P: Sequence[Tensor],
        P_flat: Tensor,
        Q: Sequence[Tensor],
        Q_flat: Tensor,
        device: torch.device,
        *,
        packs_matrices: bool,
    ) -> None:
        shapes = [(len(b.matrices), b.rows, b.columns) for b in layout.batches]
        members = (FOR_LAUNCHES if packs_matrices else NONE).cells(shapes)
        M_flat = torch.empty(layout.matrix_floats, device="meta")
        parts = M_flat.split([batch.floats for batch in layout.batches])
        M = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        self.M = Cells(M, M_flat, members, 0, device)
        self.P = Cells(P, P_flat, members, P_flat.numel(), device)
        self.Q = Cells(Q, Q_flat, members, Q_flat.numel(), device)
        packing = FOR_LAUNCHES if packs_matrices else FOR_CALLS
        joined = packing.cells(self.P.shapes)
        together = [[i for number in cell for i in members[number]] for cell in joined]
        self._tall = Cells(P, P_flat, together, P_flat.numel(), device)
        # Where the P of each cell is among those.
        self._found: dict[int, tuple[int, int]] = {}
        for place, cell in enumerate(joined):
            firsts = itertools.accumulate((self.P.shapes[i][0] for i in cell), initial=0)
            self._found |= {i: (place, first) for i, first in zip(cell, firsts, strict=False)}
        self._make_columns(Q, Q_flat, packing, device)

    def of_each_P(self, function: Callable[[Tensor], Tensor], P_flat: Tensor) -> list[Tensor]:
        """What a function makes of the columns of each P, [..., n, r]: the cells of the results.

        It must leave rows of zeros what they are.
        """
        found = [function(P) for P in self._tall.of(P_flat)]
        results = []
        for number, (b, n, r) in enumerate(self.P.shapes):
            place, first = self._found[number]
            results.append(found[place][first : first + b, :n, :r])
        return results

    def _make_columns(
        self, Q: Sequence[Tensor], Q_flat: Tensor, packing: Packing, device: torch.device
    ) -> None:
        rows = [each.reshape(-1, 1, each.shape[-1]) for each in Q]
        shapes = [(len(each), 1, each.shape[-1]) for each in rows]
        members = packing.cells(shapes)
        self._columns = Cells(rows, Q_flat, members, Q_flat.numel(), device)
        numbers, first = [torch.empty(0)] * len(rows), 0
        for i in itertools.chain.from_iterable(members):
            count, _, length = shapes[i]
            numbers[i] = torch.arange(first, first + count, device="cpu").repeat_interleave(length)
            first += count
        whole = torch.cat(numbers) if numbers else torch.empty(0)
        self._column_of = whole.to(device, torch.int32)

    def largest_of_columns(self, Q_flat: Tensor) -> Tensor:
        """The largest magnitude in each column of each Q (which is a row of memory), flat."""
        found = [cell.abs().amax(dim=-1).view(-1) for cell in self._columns.of(Q_flat)]
        return torch.cat(found) if len(found) > 1 else found[0] if found else Q_flat.abs()

    def spread_over_columns(self, values: Tensor) -> Tensor:
        """Of a number for each column of each Q, one for each element."""
        return values.index_select(0, self._column_of)
