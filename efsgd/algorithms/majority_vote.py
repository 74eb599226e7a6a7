"""The sign of each worker's momentum, and the majority of the signs.

Source: Bernstein, Wang, Azizzadenesheli, Anandkumar: "signSGD: Compressed Optimisation for
Non-Convex Problems", ICML 2018, arXiv 1802.04434; Bernstein, Zhao, Azizzadenesheli, Anandkumar:
"signSGD with Majority Vote is Communication Efficient and Fault Tolerant", ICLR 2019, arXiv
1810.05291. The latter's Signum, with one difference: a parameter's first momentum is its first
gradient, not (1 - β) times it, as in the experiments of the PowerSGD paper (arXiv 1905.13727).

A worker's momentum is its own. Its next value is worked out twice, piece by piece: for the signs,
and once the step holds. So nothing of the momenta's size is needed to make a step refusable.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from efsgd.layout import Blocks, Elementwise, Layout
from efsgd.profiling import Phases
from efsgd.wire.bits import majority, pack, unpack
from efsgd.wire.collectives import AllGather, AllReduceMean, Exchange, InFlight, Start
from efsgd.wire.payload import Field, Format

# What is worked on at once on a CPU: 1 MiB in float32, which stays in the cache. Signs are packed
# by eight, so it is a multiple of that.
FLOATS_AT_ONCE = 2**18


def sign_format(count: int) -> Format:
    """One bit for each of so many elements, without gaps; nothing where there are none."""
    return Format([[Field(count, bits=1)]] if count else [])


class GroupMomentum:
    """The momentum parameter β of a parameter group, whatever it is at the moment.

    Schedules change it from step to step, and no layout depends on it: two are equal if they are of
    one group.

    Args:
        group: the parameter group itself.
    """

    def __init__(self, group: Mapping[str, Any]) -> None:
        self._group = group

    @property
    def value(self) -> float:
        """β now."""
        return float(self._group["momentum"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GroupMomentum) and self._group is other._group

    def __hash__(self) -> int:
        return id(self._group)

    def __repr__(self) -> str:
        return "one bit"


@dataclass(frozen=True)
class _Run:
    """Neighbours in the flat buffers whose momenta go on alike."""

    where: slice
    momentum: GroupMomentum
    has_started: bool


class Voting:
    """Signs of local momenta, gathered and counted, for the tensors of one layout.

    A step makes two collectives: the all-reduce that carries the control words, and the all-gather
    of the signs, one bit for each element. The sign of zero is +1.

    Attributes:
        momenta: of this worker; changed by `commit_` alone.
        vectors: see `efsgd.compressors.Aggregator`.
        rounding: always the same.
        shows_nonfinite: False; signs do not.

    Args:
        layout: the plan; the level of an entry is its `GroupMomentum`.
        dtype: of momenta.
        device: of momenta.
    """

    numerics = "eager"
    shows_nonfinite = False

    def __init__(self, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
        self.layout, self.phases = layout, Phases()
        self.vectors = torch.zeros(layout.vector_floats, dtype=dtype, device=device)
        self.momenta = Blocks(layout, dtype, device)
        self._entries = [entry for batch in layout.batches for entry in batch.entries]
        # On the CPU: they decide what is computed.
        self._started = torch.zeros(len(self._entries), dtype=torch.bool, device="cpu")
        self._votes = Blocks(layout, torch.int8, device)
        self._at_once = FLOATS_AT_ONCE if device.type == "cpu" else 64 * FLOATS_AT_ONCE
        total = layout.matrix_floats
        self._bits = torch.zeros(sign_format(total).nbytes, dtype=torch.uint8, device=device)
        columns = max((batch.columns for batch in layout.batches), default=0)
        size = max(columns, min(self._at_once, total))
        self._scratch = torch.empty(size, dtype=dtype, device=device)
        self._gradients: Blocks | None = None

    def prepare(self, *_: Any) -> None:
        """Nothing to do."""

    def compress(self, deltas: Blocks, step: int) -> Exchange[Votes]:
        """Sends the signs of what the momenta will be.

        Args:
            deltas: this worker's gradients; not modified, and read again by `commit_`.
            step: makes no difference.

        Returns:
            This worker's own vote, that of all in flight.
        """
        self._gradients, total = deltas, self.layout.matrix_floats
        with self.phases("Signum: signs of momenta"):
            for run in self._runs():
                for piece in self._pieces(run.where):
                    torch.ge(self._next(piece, run), 0, out=self._votes.flat[piece])
            for piece in self._pieces(slice(0, total)):
                votes = self._votes.flat[piece]
                self._bits[_bytes(piece)] = pack(votes, bits=1)
                votes.mul_(2).sub_(1)
        in_flight = [(yield Start(AllReduceMean(self.vectors, "vectors")))]
        if total:
            in_flight.append((yield Start(AllGather(self._bits, "signs"))))
        return Votes(self.layout, self._votes, self._scratch, tuple(in_flight))

    def aggregate(self, local: Votes) -> Exchange[Votes]:
        """Counts the votes of all workers."""
        with self.phases("Signum: exchange signs"):
            answers: list[Tensor] = []
            for in_flight in local.in_flight:
                answers.append((yield in_flight))
        with self.phases("Signum: count votes"):
            if len(answers) > 1:
                more, as_many = majority(answers[1].view(torch.int32))
                for piece in self._pieces(slice(0, self.layout.matrix_floats)):
                    votes = self._votes.flat[piece].fill_(-1)
                    for packed, value in ((more, 2), (as_many, 1)):
                        bits = unpack(packed.view(torch.uint8)[_bytes(piece)], len(votes), bits=1)
                        votes.add_(bits.view(torch.int8), alpha=value)
        return Votes(self.layout, self._votes, self._scratch)

    def commit_(self, absent: frozenset[int]) -> None:
        """Makes the momenta those whose signs were sent, except for `absent` parameters."""
        for run in self._runs(absent):
            for piece in self._pieces(run.where):
                self.momenta.flat[piece] = self._next(piece, run)
        for position, entry in enumerate(self._entries):
            if entry.index not in absent:
                self._started[position] = True

    def state(self) -> dict[int, dict[str, Tensor]]:
        """For each parameter its momentum, and whether it was ever updated: live views."""
        return {
            entry.index: {
                "local_momentum": self.momenta.views[entry.index],
                "momentum_started": has_started,
            }
            for entry, has_started in zip(self._entries, self._started.unbind(), strict=True)
        }

    def _runs(self, absent: Container[int] = ()) -> list[_Run]:
        """All but `absent` parameters, in order."""
        runs: list[_Run] = []
        first = 0
        for entry, has_started in zip(self._entries, self._started.tolist(), strict=True):
            where = slice(first, first + entry.numel)
            first = where.stop
            if entry.index in absent:
                continue
            run = _Run(where, cast(GroupMomentum, entry.level), has_started)
            if runs:
                last = runs[-1]
                is_alike = (last.momentum, last.has_started) == (run.momentum, has_started)
                if is_alike and last.where.stop == where.start:
                    runs.pop()
                    run = _Run(slice(last.where.start, where.stop), run.momentum, has_started)
            runs.append(run)
        return runs

    def _pieces(self, where: slice) -> Iterator[slice]:
        for first in range(where.start, where.stop, self._at_once):
            yield slice(first, min(first + self._at_once, where.stop))

    def _next(self, piece: slice, run: _Run) -> Tensor:
        """What a part of the momenta will be; in scratch memory, or part of the gradients."""
        assert self._gradients is not None
        gradients = self._gradients.flat[piece]
        if not run.has_started:
            return gradients
        momentum, out = run.momentum.value, self._scratch[: len(gradients)]
        torch.mul(self.momenta.flat[piece], momentum, out=out)
        return out.add_(gradients, alpha=1 - momentum)


@dataclass(frozen=True)
class Votes:
    """Votes of one worker or of all: +1, -1, or 0 where as many are for as against.

    Attributes:
        layout: of the tensors that are voted on.
        blocks: the votes, int8.
        scratch: memory for the pieces that are handed over.
        in_flight: where these are one worker's own: the collectives that carry them.
    """

    layout: Layout
    blocks: Blocks
    scratch: Tensor
    in_flight: tuple[InFlight, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Votes always are."""
        return True

    def decompress_with_(
        self, function: Elementwise, *operands: Mapping[int, Tensor], **options: Any
    ) -> None:
        """Hands over a few rows or tensors at a time. See `efsgd.compressors.Compressed`."""
        for batch, votes in zip(self.layout.batches, self.blocks.batches, strict=True):
            for matrices, rows in batch.pieces(operands[0].keys(), self.scratch.numel()):
                part, entries = votes[matrices, rows], batch.entries[matrices]
                values = self.scratch[: part.numel()].view(part.shape).copy_(part)
                # A tensor without dimensions has no rows to choose from.
                is_whole = part.shape[1] == batch.rows
                where: Any = ... if is_whole else rows
                shapes = [e.shape if is_whole else (-1, *e.shape[1:]) for e in entries]
                function(
                    [value.view(shape) for value, shape in zip(values, shapes, strict=True)],
                    *([operand[e.index][where] for e in entries] for operand in operands),
                    **options,
                )

    def subtract_from_(self, blocks: Blocks) -> None:
        """See `efsgd.compressors.Compressed`."""

        def subtract_(values: list[Tensor], minuends: list[Tensor]) -> None:
            for value, minuend in zip(values, minuends, strict=True):
                minuend.sub_(value)

        self.decompress_with_(subtract_, blocks.views)

    def squared_norms(self, wanted: Container[int]) -> list[Tensor]:
        """See `efsgd.compressors.Compressed`."""
        views = self.blocks.views.items()
        return [(votes != 0).sum(dtype=torch.float64) for index, votes in views if index in wanted]


def _bytes(piece: slice) -> slice:
    """Where a piece lies among packed bits; it begins at a multiple of eight."""
    return slice(piece.start // 8, (piece.stop + 7) // 8)


#: The momentum form of groups whose momenta are each worker's own, and the compressor's business.
LOCAL_FORM = "local"
