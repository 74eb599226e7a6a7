"""The sign of each worker's momentum, and the majority of the signs.

Source: Bernstein, Wang, Azizzadenesheli, Anandkumar: "signSGD: Compressed Optimisation for
Non-Convex Problems", ICML 2018, arXiv 1802.04434; Bernstein, Zhao, Azizzadenesheli, Anandkumar:
"signSGD with Majority Vote is Communication Efficient and Fault Tolerant", ICLR 2019, arXiv
1810.05291. The latter's Signum, with one difference: a parameter's first momentum is its first
gradient, not (1 - β) times it, as in the experiments of the PowerSGD paper (arXiv 1905.13727).

A worker's momentum is its own. Its next value is worked out twice, chunk by chunk: for the signs,
and once the step holds. So nothing of the momenta's size is needed to make a step refusable.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Aggregator, Compressed, Placement
from efsgd.algorithms.reading import Reading, Transcript, signs
from efsgd.layout import Blocks, Elementwise, Layout, is_fake
from efsgd.wire.bits import majority, pack, unpack
from efsgd.wire.collectives import AllGather, AllReduceMean, Exchange, InFlight, Start
from efsgd.wire.payload import Field, Format

# What is worked on at once on a CPU: 1 MiB in float32, which stays in the cache. Signs are packed
# by eight, so it is a multiple of that.
FLOATS_AT_ONCE = 2**18


def sign_format(count: int) -> Format:
    """One bit for each of so many elements, without gaps; nothing where there are none."""
    return Format([[Field(count, bits=1)]] if count else [])


@dataclass(frozen=True)
class _Run:
    """Neighbours in the flat buffers whose momenta are updated in the same way."""

    where: slice
    momentum: float
    has_started: bool


class Voting(Aggregator):
    """Signs of local momenta, gathered and counted, for the tensors of one layout.

    A step makes two collectives: the all-reduce that carries the control words, and the all-gather
    of the signs, one bit for each element. The sign of zero is +1. `groups` has each tensor's
    momentum parameter β, whatever it is now. `commit_` alone changes the momenta.
    """

    def __init__(self, layout: Layout, placement: Placement) -> None:
        super().__init__(layout, placement)
        dtype, device = placement.dtype, placement.device
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

    def compress(self, deltas: Blocks, step: int) -> Exchange[Votes]:
        """Sends the signs of what the momenta will be; returns this worker's own vote, in flight.

        `deltas` are this worker's gradients; not modified, and read again by `commit_`.
        """
        self._gradients, total = deltas, self.layout.matrix_floats
        with self.phases("Signum: signs of momenta"):
            # A group that was found to be wrong is not read: what is sent then is zeros.
            for run in () if self.abstains else self._runs():
                for chunk in self._chunks(run.where):
                    torch.ge(self._next(chunk, run), 0, out=self._votes.flat[chunk])
            for chunk in self._chunks(slice(0, total)):
                votes = self._votes.flat[chunk]
                self._bits[_bytes(chunk)] = pack(votes, bits=1)
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
                for chunk in self._chunks(slice(0, self.layout.matrix_floats)):
                    votes = self._votes.flat[chunk].fill_(-1)
                    for packed, value in ((more, 2), (as_many, 1)):
                        bits = unpack(packed.view(torch.uint8)[_bytes(chunk)], len(votes), bits=1)
                        votes.add_(bits.view(torch.int8), alpha=value)
        return Votes(self.layout, self._votes, self._scratch)

    def read(self, said: Transcript) -> dict[int, Reading]:
        """The signs of the worker's momentum, as it was to be after the step."""
        if len(said.sent) < 2:
            return {}
        total, dtype = self.layout.matrix_floats, self.placement.dtype
        is_positive = unpack(said.sent[1], total, bits=1)
        votes = is_positive.to(dtype).mul_(2).sub_(1)
        bits, shown = (
            Blocks(self.layout, flat.dtype, flat.device, flat=flat).views
            for flat in (is_positive, votes)
        )
        return {index: signs(own, shown[index]) for index, own in bits.items()}

    def commit_(self, absent: frozenset[int]) -> None:
        """Makes the momenta those whose signs were sent, except for `absent` parameters."""
        for run in self._runs(absent):
            for chunk in self._chunks(run.where):
                self.momenta.flat[chunk] = self._next(chunk, run)
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
        # Without values, as in estimates of memory, all count as started.
        has_values = not is_fake(self._started)
        started = self._started.tolist() if has_values else [True] * len(self._entries)
        for entry, has_started in zip(self._entries, started, strict=True):
            where = slice(first, first + entry.numel)
            first = where.stop
            if entry.index in absent:
                continue
            run = _Run(where, float(self.groups[entry.index]["momentum"]), has_started)
            if runs:
                last = runs[-1]
                is_same = (last.momentum, last.has_started) == (run.momentum, has_started)
                if is_same and last.where.stop == where.start:
                    runs.pop()
                    run = _Run(slice(last.where.start, where.stop), run.momentum, has_started)
            runs.append(run)
        return runs

    def _chunks(self, where: slice) -> Iterator[slice]:
        for first in range(where.start, where.stop, self._at_once):
            yield slice(first, min(first + self._at_once, where.stop))

    def _next(self, chunk: slice, run: _Run) -> Tensor:
        """What a part of the momenta will be; in scratch memory, or part of the gradients."""
        assert self._gradients is not None
        gradients = self._gradients.flat[chunk]
        if not run.has_started:
            return gradients
        momentum, out = run.momentum, self._scratch[: len(gradients)]
        torch.mul(self.momenta.flat[chunk], momentum, out=out)
        return out.add_(gradients, alpha=1 - momentum)


@dataclass(frozen=True)
class Votes(Compressed):
    """Votes of one worker or of all: +1, -1, or 0 where as many are for as against; int8.

    `scratch` is memory for the chunks that are handed over. One worker's own votes have the
    collectives that carry them `in_flight`.
    """

    layout: Layout
    blocks: Blocks
    scratch: Tensor
    in_flight: tuple[InFlight, ...] = ()

    def decompress_with_(
        self, function: Elementwise, *operands: Mapping[int, Tensor], **options: Any
    ) -> None:
        """Hands over a few rows or tensors at a time."""
        for batch, votes in zip(self.layout.batches, self.blocks.batches, strict=True):
            for matrices, rows in batch.chunks(operands[0].keys(), self.scratch.numel()):
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

    def squared_norms(self, wanted: Container[int]) -> list[Tensor]:
        views = self.blocks.views.items()
        return [(votes != 0).sum(dtype=torch.float64) for index, votes in views if index in wanted]


def _bytes(chunk: slice) -> slice:
    """Where a chunk lies among packed bits; it begins at a multiple of eight."""
    return slice(chunk.start // 8, (chunk.stop + 7) // 8)


#: The momentum form of groups whose momenta are each worker's own, and the compressor's business.
LOCAL_FORM = "local"
