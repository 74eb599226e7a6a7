"""Compressors that break laws of what is sent, and of what it stands for."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from efsgd import Field, TensorCompressor
from efsgd.algorithms.low_rank.products import LowRank
from efsgd.algorithms.operators import Payload
from efsgd.algorithms.powersgd import PowerIteration
from efsgd.layout import Blocks
from efsgd.randomness import Draws
from efsgd.wire.collectives import AllGather, Exchange
from tests.testing.broken_compressors import breaks
from tests.testing.good_compressors import Half, Largest, LowRankOf, Rounded

# ---- what is sent --------------------------------------------------------------------------------


@breaks("sends_what_it_announces")
class WrongBytes(Largest):
    def payload_bytes(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, step: int = 0
    ) -> int:
        return super().payload_bytes(shapes, dtype, step) + 4 * any(len(s) == 2 for s in shapes)


@breaks("has_one_schedule")
class SendsNonzeros(Half):
    """As many values as there are."""

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return (delta[delta != 0].flatten(),)


@breaks("has_one_schedule", rank=1)
class AsksMoreIfHuge(PowerIteration):
    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[LowRank]:
        found = yield from super().compress(deltas, step)
        if float(deltas.flat.abs().max()) > 1e9:
            yield AllGather(torch.zeros(3), "more")
        return found


class AsksMoreInOddSteps(PowerIteration):
    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[LowRank]:
        found = yield from super().compress(deltas, step)
        if step % 2:
            yield AllGather(torch.zeros(3), "more")
        return found


@breaks("has_one_schedule", rank=1)
class Beatless(LowRankOf):
    """Announces the bytes of each step, and does not tell the steps apart."""

    kind = AsksMoreInOddSteps

    def payload_bytes(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, step: int = 0
    ) -> int:
        return super().payload_bytes(shapes, dtype, step) + 12 * (step % 2)


# ---- compressing and decompressing ---------------------------------------------------------------


@breaks("sends_what_it_announces")
class OtherShape(Largest):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return super().decompress(payload, shape, draws).sum(0, keepdim=True)


@breaks("decompresses_alike")
class DecompressesAtRandom(Half):
    def mask(self, shape: torch.Size, draws: Draws) -> Tensor:
        return torch.rand(shape) < 0.5


class DecompressesPrivately(Half):
    def mask(self, shape: torch.Size, draws: Draws) -> Tensor:
        return torch.rand(shape, generator=draws.private()) < 0.5


@breaks("decompresses_alike")
class IgnoresAlpha(Largest):
    def add_decompressed_(self, out: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        out.add_(self.decompress(payload, out.shape, draws))


@breaks("decompresses_alike")
class WritesToPayload(Half):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return payload[0].view(shape).mul_(self.mask(shape, draws)).clone().mul_(1.0)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return (delta.flatten().clone(),)


@breaks("decompresses_alike")
class ZeroIsSomething(Rounded):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        codes, scale = payload
        return ((codes.to(scale.dtype) - 7) * (scale / 7)).view(shape) + 1e-30


@breaks("leaves_deltas_alone")
class WritesToDelta(Half):
    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return (delta.mul_(self.mask(delta.shape, draws)).flatten().clone(),)


@breaks("leaves_deltas_alone")
@dataclasses.dataclass(frozen=True)
class SendsAView(TensorCompressor):
    averages: ClassVar[bool] = True

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return (Field(shape.numel()),)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return (delta.view(-1),)

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return payload[0].view(shape)


@breaks("leaves_deltas_alone", rank=1)
class NormalizesDeltas(PowerIteration):
    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[LowRank]:
        deltas.flat.mul_(0.5)
        return (yield from super().compress(deltas, step))
