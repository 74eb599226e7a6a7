"""The mean over the workers of matrices that are sent as codes.

Codes of logarithms do not add up, so no all-reduce can average them. There are two ways about it,
with bitwise the same result:

* `GatheredMean`: all codes go to all workers, each of which decodes them all.
* `ScatteredMean`: each worker is sent all codes of its own part of the matrices, averages it, and
  sends the mean, uncompressed, to all others.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Placement
from efsgd.algorithms.quantization.log_quantizer import LogQuantizer
from efsgd.wire.bits import pack, packed_size, unpack
from efsgd.wire.collectives import AllGather, AllToAll, Collective, Exchange


@dataclass(frozen=True)
class Coded:
    """One worker's matrices: codes, [numbers] int64, and the largest magnitudes, [matrices]."""

    codes: Tensor
    scales: Tensor


class GatheredMean:
    """All codes and scales go to all workers: what one receives grows with their number.

    `sizes` are the numbers of elements of the matrices, none of them zero, which lie one after the
    other in a flat buffer.

    `collectives` is how many it takes, that of `send` and those that `mean` asks for.
    """

    collectives: ClassVar[int] = 1

    def __init__(self, quantizer: LogQuantizer, sizes: Sequence[int], placement: Placement) -> None:
        self._quantizer, self._sizes, self._dtype = quantizer, tuple(sizes), placement.dtype
        counts = torch.tensor(self._sizes, dtype=torch.int64, device=placement.device)
        # [numbers]: to which matrix each element belongs.
        numbers, total = torch.arange(len(counts), device=counts.device), sum(self._sizes)
        self._matrix_of = numbers.repeat_interleave(counts, output_size=total)
        # Runs of matrices of one size: (how many, size).
        self._runs = [(len(list(run)), size) for size, run in itertools.groupby(self._sizes)]

    @classmethod
    def nbytes(cls, sizes: Sequence[int], bits: int, itemsize: int, world_size: int) -> int:
        """What one worker hands over: its scales, and its codes without gaps between them."""
        return len(sizes) * itemsize + packed_size(sum(sizes), bits)

    def encode(self, flat: Tensor) -> Coded:
        """The codes of finite numbers, with one scale for each matrix."""
        runs = flat.abs().split([count * size for count, size in self._runs])
        largest = [
            part.view(count, size).amax(1)
            for part, (count, size) in zip(runs, self._runs, strict=True)
        ]
        scales = torch.cat(largest)
        return Coded(self._quantizer.encode(flat, scales[self._matrix_of]), scales)

    def decode(self, coded: Coded) -> Tensor:
        """What codes decode to: [numbers], of the dtype of the scales."""
        return self._quantizer.decode(coded.codes, coded.scales[self._matrix_of])

    def send(self, coded: Coded, purpose: str) -> Collective:
        """The collective to start, which `mean` is given the answer of."""
        packed = pack(self._unsigned(coded), self._quantizer.bits)
        return AllGather(torch.cat([coded.scales.view(torch.uint8), packed]), purpose)

    def mean(self, received: Tensor, purpose: str) -> Exchange[Tensor]:
        """The mean, [numbers], of what the workers have sent, which is the answer to `send`."""
        yield from ()
        return self._average(received, self._matrix_of)

    def read(self, sent: Tensor) -> Tensor:
        """What the buffer that one worker hands to `send` decodes to: [numbers]."""
        return self._average(sent.unsqueeze(0), self._matrix_of)

    def read_mean(self, answers: Sequence[Tensor]) -> Tensor | None:
        """The mean again, from the answers of its collectives; None where one is missing."""
        return self._average(answers[0], self._matrix_of) if answers else None

    def _unsigned(self, coded: Coded) -> Tensor:
        return coded.codes & int(2**self._quantizer.bits - 1)

    def _average(self, received: Tensor, matrix_of: Tensor) -> Tensor:
        """The mean of scales and codes, [workers, bytes], in worker order."""
        count, bits = len(matrix_of), self._quantizer.bits
        head = received.shape[1] - packed_size(count, bits)
        # Copied, since they need not be aligned.
        scales = received[:, :head].clone(memory_format=torch.contiguous_format).view(self._dtype)
        total = torch.zeros(count, dtype=self._dtype, device=received.device)
        for own, packed in zip(scales, received[:, head:], strict=True):
            # Dividing first, so that a sum of finite numbers stays finite.
            codes = unpack(packed, count, bits)
            total += self._quantizer.decode(codes, own[matrix_of]) / len(received)
        return total


@dataclass(frozen=True)
class Parts:
    """Matrices in a flat buffer, cut into parts of equal size, one for each worker.

    Attributes:
        size: of a part, in numbers. The last parts may reach beyond the end.
        first: for each part, the first matrix of which it has a number.
        width: the number of matrices that a part meets, at most.
    """

    size: int
    first: tuple[int, ...]
    width: int

    @classmethod
    def cut(cls, sizes: Sequence[int], world_size: int) -> Parts:
        """Cuts them."""
        ends = list(itertools.accumulate(sizes))
        size = -(-ends[-1] // world_size)
        ranges = [range(w * size, (w + 1) * size) for w in range(world_size)]
        # A part beyond the end meets the last matrix.
        first, last = (
            [bisect_right(ends, min(own[end], ends[-1] - 1)) for own in ranges] for end in (0, -1)
        )
        width = 1 + max(b - a for a, b in zip(first, last, strict=True))
        return cls(size, tuple(first), width)


class ScatteredMean(GatheredMean):
    """Each worker averages one part: what one receives does not grow with their number."""

    collectives = 2

    def __init__(self, quantizer: LogQuantizer, sizes: Sequence[int], placement: Placement) -> None:
        super().__init__(quantizer, sizes, placement)
        self._parts = parts = Parts.cut(self._sizes, placement.world_size)
        worker, device = placement.worker, placement.device
        first = torch.tensor(parts.first, device=device)
        # [world_size, width]: whose scales go with each part; some of them only fill the row.
        within = torch.arange(parts.width, device=device)
        self._scales_of = (first[:, None] + within).clamp_(max=len(self._sizes) - 1)
        own = self._matrix_of[worker * parts.size : (worker + 1) * parts.size]
        self._own_matrix_of = torch.zeros(parts.size, dtype=torch.int64, device=device)
        self._own_matrix_of[: len(own)] = own - parts.first[worker]

    @classmethod
    def nbytes(cls, sizes: Sequence[int], bits: int, itemsize: int, world_size: int) -> int:
        """What one worker hands over: a row for each worker, and the mean of its own part."""
        parts = Parts.cut(sizes, world_size)
        row = parts.width * itemsize + packed_size(parts.size, bits)
        return world_size * row + parts.size * itemsize

    def send(self, coded: Coded, purpose: str) -> Collective:
        codes = self._unsigned(coded)
        padded = codes.new_zeros(len(self._scales_of), self._parts.size)
        padded.view(-1)[: len(codes)] = codes
        packed = torch.stack([pack(part, self._quantizer.bits) for part in padded])
        scales = coded.scales[self._scales_of].view(torch.uint8)
        return AllToAll(torch.cat([scales, packed], dim=1), purpose)

    def mean(self, received: Tensor, purpose: str) -> Exchange[Tensor]:
        means: Tensor = yield AllGather(self._average(received, self._own_matrix_of), purpose)
        return means.view(-1)[: sum(self._sizes)]

    def read(self, sent: Tensor) -> Tensor:
        count, head = len(self._matrix_of), self._parts.width * self._dtype.itemsize
        codes = [unpack(row, self._parts.size, self._quantizer.bits) for row in sent[:, head:]]
        scales = sent.new_empty(len(self._sizes) * self._dtype.itemsize).view(self._dtype)
        rows = sent[:, :head].clone(memory_format=torch.contiguous_format)  # to be aligned
        scales[self._scales_of] = rows.view(self._dtype)
        return self.decode(Coded(torch.cat(codes)[:count], scales))

    def read_mean(self, answers: Sequence[Tensor]) -> Tensor | None:
        return answers[1].view(-1)[: sum(self._sizes)] if len(answers) > 1 else None
