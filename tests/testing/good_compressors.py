"""Compressors as others would write them: good ones."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from efsgd import Field, PowerSGD, TensorCompressor
from efsgd.algorithms.interfaces import Claims
from efsgd.algorithms.operators import Payload
from efsgd.algorithms.powersgd import PowerIteration
from efsgd.algorithms.tensorwise import Tensorwise
from efsgd.randomness import Draws


@dataclasses.dataclass(frozen=True)
class Largest(TensorCompressor):
    """The largest element and where it is: gathered, with positions of eight bytes."""

    together: bool = False

    @property
    def takes_all_at_once(self) -> bool:
        return self.together

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return Field(1), Field(1, torch.int64)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        where = delta.abs().argmax().view(1)
        return delta.view(-1)[where], where

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        value, where = payload
        return value.new_zeros(shape.numel()).index_copy(0, where, value).view(shape)

    def claims(self) -> Claims:
        return Claims(False, contraction=lambda shape: 1 / torch.Size(shape).numel())


@dataclasses.dataclass(frozen=True)
class Half(TensorCompressor):
    """Every element with probability 1/2, the same everywhere: averaged."""

    seed: int = 0
    averages: ClassVar[bool] = True

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return (Field(shape.numel()),)

    def mask(self, shape: torch.Size, draws: Draws) -> Tensor:
        return torch.rand(shape, generator=draws.shared()) < 0.5

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return ((delta * self.mask(delta.shape, draws)).flatten(),)

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return payload[0].view(shape) * self.mask(shape, draws)

    def claims(self) -> Claims:
        return Claims(True, is_random=True, contraction=lambda shape: 0.5)


@dataclasses.dataclass(frozen=True)
class Rounded(TensorCompressor):
    """Multiples of a 7th of the largest element, rounded at random: codes of 4 bits, gathered."""

    seed: int = 0

    def compresses(self, shape: torch.Size) -> bool:
        return shape.numel() > 1

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return Field(shape.numel(), bits=4), Field(1)

    def noise(self, delta: Tensor, draws: Draws) -> Tensor:
        return torch.rand(delta.shape, generator=draws.private(), dtype=delta.dtype)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        scale = delta.abs().max().view(1)
        parts = torch.where(scale > 0, delta / scale, 0) * 7
        # Codes begin at 0 for -7; a scale of zero makes zeros of them all.
        return (parts + self.noise(delta, draws)).floor().long().flatten() + 7, scale

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        codes, scale = payload
        return ((codes.to(scale.dtype) - 7) * (scale / 7)).view(shape)

    def claims(self) -> Claims:
        return Claims(False, is_random=True, is_unbiased=True)


GOOD: list[Any] = [
    PowerSGD(rank=1),
    PowerSGD(rank=2, min_compression_rate=0.0, warm_start=False),
    Largest(),
    Largest(together=True),
    Half(),
    Rounded(),
]


# ---- what broken ones start from ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LowRankOf(PowerSGD):
    kind: ClassVar[type[PowerIteration]] = PowerIteration

    def aggregator(self, layout: Any, settings: Any, placement: Any) -> PowerIteration:
        options = {"seed": settings["seed"], "warm_start": settings["warm_start"]}
        return self.kind(layout, placement, **options)


class TensorwiseOf(Largest):
    kind: ClassVar[type[Tensorwise]] = Tensorwise

    def aggregator(self, layout: Any, settings: Any, placement: Any) -> Tensorwise:
        return self.kind(layout, placement, averages=self.averages)
