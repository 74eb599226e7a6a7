"""Logarithmic codes: few bits for each number, finer steps for the smaller ones.

Source: Li et al.: "LQ-SGD", 2025, arXiv 2506.17974.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.checks import require_integer, require_number
from efsgd.layout import is_fake
from efsgd.wire.bits import MAX_BITS

# Below this alpha the logarithm is a straight line to all digits of float64.
_LINEAR = 2.0**-54


# Beyond these, float32 would not tell neighboring levels apart, or would overflow.
_BITS_OF_FLOAT32 = 16
_ALPHA_OF_FLOAT32 = 2.0**32


@dataclass(frozen=True)
class LogQuantizer:
    """Numbers from -scale to scale as signed codes of a few bits.

    A number x of scale s becomes round(L·q(x / s)), where q(x) = sign(x)·ln(1 + α·abs(x)) / ln(1 +
    α) and L = 2^(bits - 1) - 1 is the number of levels of either sign. At most it is moved by
    s·ln(1 + α)·(abs(x) / s + 1 / α) / 2L, up to a factor of 1 + O(1 / L).

    Laws: what codes decode to has the same codes again, if its dtype can hold it; a power of two
    that multiplies numbers and scale changes no code.

    Source: Li et al. 2025, arXiv 2506.17974.

    Attributes:
        bits: of a code, 2 to 32.
        alpha: α, at least 0. The larger it is, the finer are the steps near zero; 0 has equal
            steps.
    """

    bits: int = 8
    alpha: float = 10.0

    def __post_init__(self) -> None:
        require_integer("bits", self.bits, 2, MAX_BITS, remedy="8 is usual.")
        usual = "10.0 is usual, and 0 gives equal steps."
        require_number("alpha", self.alpha, remedy=usual)

    @property
    def levels(self) -> int:
        """L, the largest code."""
        return int(2 ** (self.bits - 1) - 1)

    def compand(self, x: Tensor) -> Tensor:
        """q(x) for x from -1 to 1, in its dtype; by ln(1 + αx), which is accurate for every α."""
        if self.alpha < _LINEAR:
            return x.clone()
        magnitude = torch.log1p(float(self.alpha) * x.abs()).div_(math.log1p(self.alpha))
        return magnitude.copysign_(x)

    def expand(self, q: Tensor) -> Tensor:
        """The inverse of `compand`: sign(q)·((1 + α)^|q| - 1) / α, in the dtype of q."""
        if self.alpha < _LINEAR:
            return q.clone()
        magnitude = torch.expm1(q.abs() * math.log1p(self.alpha)).div_(float(self.alpha))
        magnitude.masked_fill_(q.abs() == 1, 1.0)  # whatever the rounding of α
        return magnitude.copysign_(q)

    def encode(self, x: Tensor, scale: Tensor) -> Tensor:
        """The codes of finite numbers, int64 from -L to L.

        `scale` is the largest magnitude in x, or more, of a shape that broadcasts; 0 where x is.
        """
        if self.bits > _BITS_OF_FLOAT32 or self.alpha > _ALPHA_OF_FLOAT32:
            x, scale = x.double(), scale.double()
        ratio = x / torch.where(scale > 0, scale, 1)
        return self.compand(ratio).mul_(self.levels).round_().long()

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """What codes decode to, in the dtype of `scale`: zeros where they or the scales are zero.

        Equal codes and scales give bitwise equal numbers. Of a code the lowest `bits` count: it is
        from -L to L, or in its place from 0 to 2^bits - 1 what `efsgd.wire.bits` packs.
        """
        codes = codes.long() & (2**self.bits - 1)
        if self.bits <= _BITS_OF_FLOAT32:
            table = _table.__wrapped__ if is_fake(scale) else _table
            return table(self, scale.dtype, scale.device)[codes] * scale
        return (self._unit(codes) * scale.double()).to(scale.dtype)

    def _unit(self, codes: Tensor) -> Tensor:
        """What codes from 0 to 2^bits - 1 decode to at scale 1, float64."""
        half = 2 ** (self.bits - 1)
        signed = (codes ^ half) - half  # two's complement: no bits set is zero
        return self.expand((signed.double() / self.levels).clamp_(min=-1))


@functools.lru_cache(maxsize=32)
def _table(quantizer: LogQuantizer, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What each code decodes to at scale 1: [2**bits]."""
    return quantizer._unit(torch.arange(2**quantizer.bits, device="cpu")).to(device, dtype)
