"""The mean over the workers of matrices that are sent as codes.

Codes of logarithms do not add up, so no all-reduce can average them. There are two ways about it,
with bitwise the same result:

* `GatheredMean`: all codes go to all workers, each of which decodes them all.
* `ScatteredMean`: each worker is sent all codes of its own part of the matrices, averages it, and
  sends the mean, uncompressed, to all others.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.algorithms.quantization.log_quantizer import LogQuantizer
from efsgd.wire.bits import pack, packed_size, unpack
from efsgd.wire.collectives import AllGather, AllToAll, Exchange


@dataclass(frozen=True)
class Coded:
    """One worker's matrices, as codes.

    Attributes:
        codes: [numbers] int64.
        scales: [matrices], the largest magnitude in each.
    """

    codes: Tensor
    scales: Tensor


class Coding:
    """Turns matrices that lie one after the other in a flat buffer into codes, and back.

    Attributes:
        quantizer: makes the codes.
        sizes: the number of elements of each matrix.
        matrix_of: [numbers] int64: to which matrix each element belongs.

    Args:
        quantizer: makes the codes.
        sizes: the number of elements of each matrix, none of them zero.
        device: of the buffers.
    """

    def __init__(self, quantizer: LogQuantizer, sizes: Sequence[int], device: torch.device) -> None:
        self.quantizer, self.sizes = quantizer, tuple(sizes)
        counts = torch.tensor(self.sizes, dtype=torch.int64, device=device)
        self.matrix_of = torch.arange(len(counts), device=device).repeat_interleave(counts)

    def encode(self, flat: Tensor) -> Coded:
        """The codes of all matrices, with one scale for each.

        Args:
            flat: [numbers], finite.
        """
        parts = list(flat.split(self.sizes))
        scales = torch.stack(torch._foreach_norm(parts, math.inf)) if parts else flat.new_zeros(0)
        return Coded(self.quantizer.encode(flat, scales[self.matrix_of]), scales)

    def decode(self, coded: Coded) -> Tensor:
        """What codes stand for: [numbers], of the dtype of the scales."""
        return self.quantizer.decode(coded.codes, coded.scales[self.matrix_of])


class GatheredMean:
    """All codes and scales go to all workers: what one receives grows with their number.

    Args:
        coding: of the matrices.
    """

    def __init__(self, coding: Coding) -> None:
        self._coding = coding

    @staticmethod
    def nbytes(sizes: Sequence[int], bits: int, itemsize: int) -> int:
        """What one worker hands over: its scales, and its codes without gaps between them."""
        return len(sizes) * itemsize + packed_size(sum(sizes), bits)

    def send(self, coded: Coded, purpose: str) -> AllGather:
        """The collective to start, which `mean` is given the answer of."""
        packed = pack(coded.codes & _mask(self._coding), self._coding.quantizer.bits)
        return AllGather(torch.cat([coded.scales.view(torch.uint8), packed]), purpose)

    def mean(self, received: Tensor, dtype: torch.dtype, purpose: str) -> Exchange[Tensor]:
        """The mean of what the workers have sent, in worker order: [numbers].

        Args:
            received: the answer to `send`.
            dtype: of the numbers.
            purpose: makes no difference.
        """
        coding, bits = self._coding, self._coding.quantizer.bits
        count, head = sum(coding.sizes), len(coding.sizes) * dtype.itemsize
        scales = _scales(received[:, :head], dtype)
        total = torch.zeros(count, dtype=dtype, device=received.device)
        for own, packed in zip(scales, received[:, head:], strict=True):
            # Dividing first, so that a sum of finite numbers stays finite.
            total += coding.decode(Coded(unpack(packed, count, bits), own)) / len(received)
        yield from ()
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
        """Cuts them.

        Example:
            >>> from efsgd.algorithms.quantization.coded_mean import Parts
            >>> Parts.cut([4, 2, 5], world_size=3)
            Parts(size=4, first=(0, 1, 2), width=2)
        """
        ends = list(itertools.accumulate(sizes))
        size = -(-ends[-1] // world_size)
        ranges = [range(w * size, (w + 1) * size) for w in range(world_size)]
        # A part beyond the end meets the last matrix.
        first, last = (
            [bisect_right(ends, min(own[end], ends[-1] - 1)) for own in ranges] for end in (0, -1)
        )
        width = 1 + max(b - a for a, b in zip(first, last, strict=True))
        return cls(size, tuple(first), width)


class ScatteredMean:
    """Each worker averages one part: what one receives does not grow with their number.

    Args:
        coding: of the matrices, of which there is at least one.
        worker: this worker.
        world_size: the number of workers.
    """

    def __init__(self, coding: Coding, worker: int, world_size: int) -> None:
        self._coding = coding
        self._parts = parts = Parts.cut(coding.sizes, world_size)
        device = coding.matrix_of.device
        first = torch.tensor(parts.first, device=device)
        # [world_size, width]: whose scales go with each part; some of them only fill the row.
        within = torch.arange(parts.width, device=device)
        self._scales_of = (first[:, None] + within).clamp_(max=len(coding.sizes) - 1)
        own = coding.matrix_of[worker * parts.size : (worker + 1) * parts.size]
        self._own_matrix_of = torch.zeros(parts.size, dtype=torch.int64, device=device)
        self._own_matrix_of[: len(own)] = own - parts.first[worker]

    @staticmethod
    def nbytes(sizes: Sequence[int], bits: int, itemsize: int, world_size: int) -> int:
        """What one worker hands over: a row for each worker, and the mean of its own part."""
        parts = Parts.cut(sizes, world_size)
        row = parts.width * itemsize + packed_size(parts.size, bits)
        return world_size * row + parts.size * itemsize

    def send(self, coded: Coded, purpose: str) -> AllToAll:
        """The collective to start, which `mean` is given the answer of."""
        bits, codes = self._coding.quantizer.bits, coded.codes & _mask(self._coding)
        padded = codes.new_zeros(len(self._scales_of), self._parts.size)
        padded.view(-1)[: len(codes)] = codes
        packed = torch.stack([pack(part, bits) for part in padded])
        scales = coded.scales[self._scales_of].view(torch.uint8)
        return AllToAll(torch.cat([scales, packed], dim=1), purpose)

    def mean(self, received: Tensor, dtype: torch.dtype, purpose: str) -> Exchange[Tensor]:
        """The mean of what the workers have sent, in worker order: [numbers].

        Args:
            received: the answer to `send`.
            dtype: of the numbers.
            purpose: what is sent, for error messages and traces.
        """
        quantizer, parts = self._coding.quantizer, self._parts
        head = parts.width * dtype.itemsize
        scales = _scales(received[:, :head], dtype)
        total = torch.zeros(parts.size, dtype=dtype, device=received.device)
        for own, packed in zip(scales, received[:, head:], strict=True):
            codes = unpack(packed, parts.size, quantizer.bits)
            total += quantizer.decode(codes, own[self._own_matrix_of]) / len(received)
        means: Tensor = yield AllGather(total, purpose)
        return means.view(-1)[: sum(self._coding.sizes)]


#: Either way.
CodedMean = GatheredMean | ScatteredMean


def _scales(bytes_: Tensor, dtype: torch.dtype) -> Tensor:
    """[workers, n] of `dtype` from [workers, n bytes], which need not be aligned."""
    return bytes_.clone(memory_format=torch.contiguous_format).view(dtype)


def _mask(coding: Coding) -> int:
    return int(2**coding.quantizer.bits - 1)
