"""Each element as one of equally spaced values from the smallest to the largest."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Claims
from efsgd.algorithms.operators import Payload
from efsgd.checks import require_bool, require_integer
from efsgd.compressors.numerics import SMALL, chunks, power_of_two, uniform
from efsgd.compressors.tensor_compressor import TensorCompressor
from efsgd.randomness import Draws, RowDraws
from efsgd.wire.payload import Field

_MAX_BITS = 16


@dataclass(frozen=True)
class UniformQuantized(TensorCompressor):
    """Sends each element in a few bits: min-max quantization over the whole tensor.

    With L = 2**bits - 1 an element x becomes the code round(L·(x − min) / (max − min)), and the
    code c becomes min + (c / L)·(max − min). The smallest and the largest element are exact, and
    with them a tensor of equal elements. Payloads are gathered.

    Rounding to nearest is off by at most half a step of (max − min) / L. Stochastic rounding goes
    up or down, by less than a step, so that the mean over random numbers is the element. What is
    not sent of d elements has at most (d − 2) / (2 L²) times their squared norm, with stochastic
    rounding in the mean. For long tensors that is more than 1, and is reached where most elements
    are zero: in general zero is none of the values, and does not stay zero.

    Source: the usual uniform (min-max) quantization. Stochastic rounding of gradients: Alistarh,
    Grubic, Li, Tomioka, Vojnovic: "QSGD", NeurIPS 2017, arXiv 1610.02132, there on another grid.

    Attributes:
        bits: of a code, from 1 to 16. May be set per parameter group.
        stochastic: whether rounding is stochastic, by random numbers of each worker's own. May be
            set per parameter group.
        seed: of these random numbers.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from efsgd import ErrorFeedbackSGD, UniformQuantized
        >>> x = torch.zeros(4, requires_grad=True)
        >>> x.grad = torch.tensor([0.0, 3.0, 1.25, 1.75])
        >>> compressor = UniformQuantized(bits=2)
        >>> ErrorFeedbackSGD([x], lr=1.0, momentum_form="sgd", compressor=compressor).step()
        >>> x.tolist()
        [0.0, -3.0, -1.0, -2.0]
        >>> compressor.payload_bytes([(64, 32)])  # of 8192 in float32
        520
    """

    bits: int = 8
    stochastic: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_integer("bits", self.bits, 1, _MAX_BITS, remedy="8 take a quarter of float32.")
        require_bool("stochastic", self.stochastic)
        require_integer("seed", self.seed, 0)

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        """A code for each element; the smallest and the largest element."""
        return Field(shape.numel(), bits=self.bits), Field(2)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        """The codes, [numel] uint8 or int32, and [min, max]."""
        if self.stochastic and self.takes_rows(delta.shape):
            codes, bounds = self.compress_rows(delta.unsqueeze(0), draws.as_rows())
            return codes[0], bounds[0]
        low, high = _bounds(*torch.aminmax(delta))
        codes = torch.empty(delta.numel(), dtype=self._dtype, device=delta.device)
        generator = draws.private() if self.stochastic else None
        for chunk, place in chunks(delta, codes):
            levels = self._levels(chunk, low, high)
            if generator is None:
                levels.round_()
            else:
                chances = torch.rand(
                    levels.shape, dtype=levels.dtype, generator=generator, device="cpu"
                )
                levels = _rounded(levels, chances.to(levels.device))
            place.copy_(levels)
        return codes, torch.stack([low, high])

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        low, high = payload[1]
        return self._values(payload[0].view(shape), low, high)

    def add_decompressed_(self, out: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        for part, codes in chunks(out, payload[0]):
            part.add_(self.decompress((codes, payload[1]), part.shape, draws), alpha=alpha)

    def takes_rows(self, shape: torch.Size) -> bool:
        return not self.stochastic or shape.numel() <= SMALL

    def compress_rows(self, deltas: Tensor, draws: RowDraws) -> Payload:
        rows = deltas.view(len(deltas), -1)
        low, high = _bounds(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True))
        levels = self._levels(rows, low, high)
        if self.stochastic:
            bits = draws.private_bits(rows.shape[1], rows.device)
            levels = _rounded(levels, uniform(bits, rows.dtype))
        else:
            levels.round_()
        return levels.to(self._dtype), torch.cat([low, high], dim=1)

    def decompress_rows(self, payload: Payload, shape: torch.Size, draws: RowDraws) -> Tensor:
        return self._values(payload[0], *payload[1].split(1, dim=1)).view(-1, *shape)

    def claims(self) -> Claims:
        """Unbiased where stochastic. Whether it contracts depends on the length of a tensor."""
        return Claims(self.averages, is_random=self.stochastic, is_unbiased=self.stochastic)

    def _levels(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Where elements lie between the bounds, from 0 to L, not rounded; a new tensor."""
        scale = power_of_two(low, high)
        span = high / scale - low / scale
        # Divided by the span itself, so that the largest element is exactly the last code.
        levels = (x / scale).sub_(low / scale).div_(torch.where(span > 0, span, 1.0))
        return levels.mul_(self._last)

    def _values(self, codes: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """What codes stand for."""
        scale = power_of_two(low, high)
        fractions = codes.to(low.dtype).div_(self._last)
        return torch.lerp(low / scale, high / scale, fractions).mul_(scale)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.int32

    @property
    def _last(self) -> int:
        return int(2**self.bits - 1)


def _bounds(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The same bounds, with no sign at zero, so that equal ones have equal bytes."""
    return low + 0.0, high + 0.0


def _rounded(levels: Tensor, chances: Tensor) -> Tensor:
    """Levels (modified in place) up or down, by numbers that are uniform in [0, 1)."""
    lower = levels.floor()
    return lower.add_(chances < levels.sub_(lower))
