"""What native passes do for the matrices of one layout, and what they leave to others.

They serve float32 on CPUs and ranks up to 8. Each method is named after lines of the paper, does
what these say for the matrices that are served, and returns which those are. All others are left to
the caller's own code, which is the specification.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from efsgd.algorithms.error_feedback import descend_
from efsgd.algorithms.interfaces import Gradients, copy_
from efsgd.algorithms.low_rank.native.library import Batch, Rule, library
from efsgd.algorithms.sgd import sgd_
from efsgd.layout import Blocks, Elementwise, Entry, Layout, is_fake, real_view

MAX_RANK = 8
_HALF = torch.bfloat16
_PLAIN = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True)
class _Table:
    """The batches of one rank, as the library of that rank takes them.

    Attributes:
        positions: of these batches in the layout.
        offsets, Q_offsets: where each begins in buffers of D and of Q, in bytes.
        batches: one for each position.
        members: parameters with the number of their matrices: of each batch, in order.
        gradients, parameters, momenta, is_half: what `batches` point to, for each matrix.
    """

    library: ctypes.CDLL
    positions: list[int]
    offsets: list[int]
    Q_offsets: list[int]
    batches: Any
    members: list[list[tuple[Entry, int]]]
    gradients: list[Any]
    parameters: list[Any]
    momenta: list[Any]
    is_half: list[Any]


class Passes:
    """The passes over the matrices of one layout, by as many threads as torch uses.

    Attributes:
        are_native: whether any are.
        served: the positions in the layout of the batches that they serve.
    """

    @classmethod
    def of(cls, layout: Layout, example: Tensor) -> Passes:
        """Those that this machine has for a layout, whose matrices are like `example`."""
        if not example.is_cpu or example.dtype != torch.float32 or is_fake(example):
            return cls(layout, {})
        ranks = {batch.level for batch in layout.batches if isinstance(batch.level, int)}
        found = {rank: library(rank) for rank in sorted(ranks) if rank <= MAX_RANK}
        libraries = {rank: own for rank, own in found.items() if own is not None}
        return cls(layout, libraries if len(libraries) == len(found) else {})

    def __init__(self, layout: Layout, libraries: Mapping[int, ctypes.CDLL]) -> None:
        self.are_native = bool(libraries)
        self._tables = [_table(layout, rank, found) for rank, found in libraries.items()]
        self.served = frozenset(position for table in self._tables for position in table.positions)

    def lines_7_and_3(
        self,
        deltas: Blocks,
        errors: Blocks | None,
        gradients: Gradients,
        scale: float,
        queries: Sequence[Tensor],
        P: Sequence[Tensor],
    ) -> None:
        """Δ = e + scale g, and P = Δ Q, for `served`."""
        for table in self._tables:
            for members, places, halves in zip(
                table.members, table.gradients, table.is_half, strict=True
            ):
                at = 0
                for entry, matrices in members:
                    gradient = gradients[entry.index]
                    if gradient is None:
                        gradient = deltas.views[entry.index].zero_()
                    elif not _is_plain(gradient, entry.shape):
                        gradient = deltas.views[entry.index].copy_(real_view(gradient))
                    _point_(places, halves, at, gradient, matrices)
                    at += matrices
        for table in self._tables:
            kept = [_put_Q_(batch, queries[k]) for batch, k in _pairs(table)]
            self._put_(table, deltas, errors, P)
            table.library.add_and_project(table.batches, len(kept), _threads(), scale)

    def line_6(
        self, deltas: Blocks, P_hat: Sequence[Tensor], Q: Tensor, own: Tensor
    ) -> frozenset[int]:
        """Q = Δ^T P̂, written to `own` as well: both hold the Q of all batches one after the other.

        Returns the positions of batches that are done.
        """
        for table in self._tables:
            self._put_(table, deltas, None, P_hat)
            starts = Q.data_ptr(), own.data_ptr()
            for batch, offset in zip(table.batches, table.Q_offsets, strict=True):
                batch.q, batch.own = (start + offset for start in starts)
            table.library.back_project(table.batches, len(table.positions), _threads())
        return self.served

    def line_9(
        self, blocks: Blocks, P_hat: Sequence[Tensor], Q: Sequence[Tensor]
    ) -> frozenset[int]:
        """Δ - P̂Q^T, in place. Returns the positions of batches that are done."""
        for table in self._tables:
            kept = [_put_Q_(batch, Q[k]) for batch, k in _pairs(table)]
            self._put_(table, blocks, None, P_hat)
            table.library.subtract(table.batches, len(kept), _threads())
        return self.served

    def lines_11_to_13(
        self,
        P_hat: Sequence[Tensor],
        Q: Sequence[Tensor],
        function: Elementwise,
        operands: Sequence[Mapping[int, Tensor]],
        options: Mapping[str, Any],
    ) -> frozenset[int]:
        """What `function` does with P̂Q^T. Returns the indices of parameters that are done."""
        if function not in _RULES or len(operands) > 2:
            return frozenset()
        rule, done = _RULES[function](len(operands) > 1, **options), set()
        for table in self._tables:
            written: list[Tensor] = []
            for members, xs, ws, halves in zip(
                table.members, table.parameters, table.momenta, table.is_half, strict=True
            ):
                at = 0
                for entry, matrices in members:
                    own = [each[entry.index] for each in operands if entry.index in each]
                    is_served = bool(own) and own[0].dtype == own[-1].dtype
                    is_served = is_served and all([_is_plain(each, entry.shape) for each in own])
                    _point_(xs, halves, at, own[0] if is_served else None, matrices)
                    _point_(ws, halves, at, own[1] if is_served and own[1:] else None, matrices)
                    at += matrices
                    if is_served:
                        written += own
                        done.add(entry.index)
            if written:
                kept = [_put_Q_(batch, Q[k]) for batch, k in _pairs(table)]
                self._put_(table, None, None, P_hat)
                number, threads = len(kept), _threads()
                table.library.descend(table.batches, number, threads, ctypes.byref(rule))
                for tensor in written:  # as torch's own operations tell autograd
                    increment_version(tensor)
        return frozenset(done)

    def _put_(
        self, table: _Table, deltas: Blocks | None, errors: Blocks | None, P: Sequence[Tensor]
    ) -> None:
        D = None if deltas is None else deltas.flat.data_ptr()
        e = None if errors is None else errors.flat.data_ptr()
        for batch, position, offset in zip(
            table.batches, table.positions, table.offsets, strict=True
        ):
            batch.p = P[position].data_ptr()
            batch.p_matrix, batch.p_row, batch.p_column = P[position].stride()
            batch.d = None if D is None else D + offset
            batch.e = None if e is None else e + offset


def _table(layout: Layout, rank: int, found: ctypes.CDLL) -> _Table:
    M_bytes = [4 * batch.floats for batch in layout.batches]
    Q_bytes = [
        4 * len(batch.matrices) * cast(int, batch.level) * batch.columns for batch in layout.batches
    ]
    positions = [k for k, batch in enumerate(layout.batches) if batch.level == rank]
    chosen = [layout.batches[k] for k in positions]
    members = [
        [(entry, entry.numel // (batch.rows * batch.columns)) for entry in batch.entries]
        for batch in chosen
    ]
    arrays = [
        [(kind * len(batch.matrices))() for batch in chosen]
        for kind in (*[ctypes.c_void_p] * 3, ctypes.c_int64)
    ]
    batches = (Batch * len(chosen))()
    for own, batch, *pointers in zip(batches, chosen, *arrays, strict=True):
        own.count, own.n, own.m = len(batch.matrices), batch.rows, batch.columns
        own.g, own.x, own.w, own.is_half = map(ctypes.addressof, pointers)
    places, Q_places = ([sum(own[:k]) for k in positions] for own in (M_bytes, Q_bytes))
    return _Table(found, positions, places, Q_places, batches, members, *arrays)


def _pairs(table: _Table) -> Any:
    return zip(table.batches, table.positions, strict=True)


def _put_Q_(batch: Batch, Q: Tensor) -> Tensor:
    """Returns what must be kept alive until the pass is done."""
    contiguous = Q.contiguous()
    batch.q = contiguous.data_ptr()
    return contiguous


def _is_plain(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Whether it is a matrix after the other in memory, with nothing to be done when it is read."""
    return (
        type(tensor) in _PLAIN
        and (tensor.dtype == torch.float32 or tensor.dtype == _HALF)
        and tensor.shape == shape
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and tensor.is_cpu
    )


def _point_(places: Any, halves: Any, at: int, tensor: Tensor | None, matrices: int) -> None:
    """The pointers of a parameter's matrices."""
    if tensor is None:
        places[at : at + matrices] = [None] * matrices
        return
    start, each = tensor.data_ptr(), tensor.numel() // matrices * tensor.itemsize
    is_half = tensor.dtype == _HALF
    for k in range(matrices):
        places[at + k], halves[at + k] = start + k * each, is_half


def _threads() -> int:
    return torch.get_num_threads()


# ---- What functions do, in numbers: u = c P̂Q^T + decay x; w = lambda w + a u; x -= lr (u + t w) --


def _of_paper(
    has_momentum: bool, *, lr: Any, momentum: Any, weight_decay: Any = None, **others: Any
) -> Rule:
    """See `descend_`. Without momentum w is u."""
    numbers = map(float, (weight_decay or 0.0, momentum, 1.0, 1.0, lr))
    return Rule(_factor(**others), *numbers, False, True, False)


def _of_sgd(
    has_momentum: bool,
    *,
    is_first: bool,
    lr: Any,
    momentum: Any,
    dampening: Any,
    nesterov: bool,
    weight_decay: Any = None,
    **others: Any,
) -> Rule:
    """See `sgd_`."""
    numbers = map(float, (weight_decay or 0.0, momentum, 1 - dampening, momentum, lr))
    return Rule(_factor(**others), *numbers, is_first, nesterov and has_momentum, False)


def _of_copy(has_momentum: bool, **others: Any) -> Rule:
    """See `copy_`."""
    return Rule(_factor(**others), 0.0, 0.0, 0.0, 0.0, 0.0, False, False, True)


def _factor(clip: Any = None, maximize: bool = False, **_: Any) -> float:
    factor = 1.0 if clip is None else float(clip)
    return -factor if maximize else factor


_RULES: dict[Elementwise, Callable[..., Rule]] = {
    descend_: _of_paper,
    sgd_: _of_sgd,
    copy_: _of_copy,
}
