"""Compressors that break laws of what is sent, what it decodes to, parameters and errors."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from efsgd import Field, TensorCompressor
from efsgd.algorithms.low_rank.products import LowRank
from efsgd.algorithms.operators import Payload
from efsgd.algorithms.powersgd import PowerIteration
from efsgd.algorithms.tensorwise import Dense, Sent, Tensorwise
from efsgd.layout import Blocks, Elementwise
from efsgd.randomness import Draws, RowDraws
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


class HalfOfRows(Half):
    def takes_rows(self, shape: torch.Size) -> bool:
        return True

    def compress_rows(self, deltas: Tensor, draws: RowDraws) -> Payload:
        fields = [self.compress(delta, draws[row])[0] for row, delta in enumerate(deltas)]
        return (torch.stack(fields),)

    def decompress_rows(self, payload: Payload, shape: torch.Size, draws: RowDraws) -> Tensor:
        rows = enumerate(payload[0])
        return torch.stack([self.decompress((own,), shape, draws[row]) for row, own in rows])


@breaks("compresses_rows_alike")
class RoundsRowsOtherwise(HalfOfRows):
    def compress_rows(self, deltas: Tensor, draws: RowDraws) -> Payload:
        return super().compress_rows(deltas * (1 + 1e-15), draws)


@breaks("compresses_rows_alike")
class DrawsForTheFirstRow(HalfOfRows):
    def decompress_rows(self, payload: Payload, shape: torch.Size, draws: RowDraws) -> Tensor:
        return (payload[0].view(-1, *shape) * self.mask(shape, draws[0])).clone()


@breaks("compresses_rows_alike")
class AddsRowsOtherwise(HalfOfRows):
    def add_decompressed_rows_(
        self, out: Tensor, payload: Payload, draws: RowDraws, alpha: float
    ) -> None:
        out.sub_(self.decompress_rows(payload, out.shape[1:], draws))


@breaks("compresses_rows_alike")
class WritesToRows(HalfOfRows):
    def decompress_rows(self, payload: Payload, shape: torch.Size, draws: RowDraws) -> Tensor:
        found = super().decompress_rows(payload, shape, draws)
        payload[0].zero_()
        return found


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


# ---- parameters and errors -----------------------------------------------------------------------


class ScratchInGradients(LowRank):
    def decompress_with_(
        self, function: Elementwise, *operands: Mapping[int, Tensor], **options: Any
    ) -> None:
        super().decompress_with_(function, *operands, **options)
        for parameter in operands[0].values():
            if parameter.grad is not None and self.layout.batches:
                parameter.grad.zero_()


@breaks("keeps_shapes_and_dtypes", rank=1)
class UsesGradients(PowerIteration):
    def aggregate(self, local: LowRank) -> Exchange[LowRank]:
        found = yield from super().aggregate(local)
        fields = {each.name: getattr(found, each.name) for each in dataclasses.fields(found)}
        return ScratchInGradients(**fields)


@breaks("survives_zeros")
class DividesByTheNorm(Rounded):
    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        scale = delta.abs().max().view(1)
        codes = (delta / scale * 7 + self.noise(delta, draws)).floor().nan_to_num(0.0)
        return codes.long().flatten() + 7, scale / scale * scale


@breaks("survives_scales")
@dataclasses.dataclass(frozen=True)
class Overflowing(TensorCompressor):
    """All elements, and a norm that overflows."""

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return Field(shape.numel()), Field(1)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        norm = delta.square().sum().sqrt().view(1)
        return torch.where(norm > 0, delta.flatten() / norm, 0), norm

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return (payload[0] * payload[1]).view(shape)


@breaks("survives_zeros")
class DiesOfZeros(Tensorwise):
    """Sends nothing if the last step had nothing."""

    gain = 1.0

    def add_(
        self,
        flat: Tensor,
        payloads: Sequence[Payload],
        step: int,
        alpha: float = 1.0,
        drawn: Any = None,
    ) -> None:
        super().add_(flat, payloads, step, alpha * self.gain, drawn)

    def commit_(self, absent: frozenset[int]) -> None:
        self.gain = float((self._mean.flat != 0).any())


@breaks("keeps_workers_equal")
class KnowsTheWorker(Tensorwise):
    def aggregate(self, local: Sent) -> Exchange[Dense]:
        found = yield from super().aggregate(local)
        found.blocks.flat.mul_(1 + 1e-6 * self.placement.worker)
        return found


@breaks("loses_nothing")
@breaks("averages_what_is_sent", options={"error_feedback": False})
@dataclasses.dataclass(frozen=True)
class AveragesRoots(TensorCompressor):
    """Says that the mean of roots is the root of the mean."""

    averages: ClassVar[bool] = True

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return (Field(shape.numel()),)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return ((delta.sign() * delta.abs().sqrt()).flatten(),)

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return (payload[0].sign() * payload[0].square()).view(shape)


@breaks("loses_nothing")
@breaks("averages_what_is_sent", options={"error_feedback": False})
@dataclasses.dataclass(frozen=True)
class AveragesSigns(TensorCompressor):
    """Says that the mean of products is the product of means."""

    averages: ClassVar[bool] = True

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return Field(shape.numel()), Field(1)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return delta.sign().view(-1), delta.abs().mean().view(1)

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return (payload[0] * payload[1]).view(shape)


@breaks("loses_nothing")
class CodesTooLarge(Rounded):
    """On the wire the codes lose their highest bit; here they do not."""

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return Field(shape.numel(), bits=3), Field(1)


class GuessesTheNorm(Dense):
    def squared_norms(self, wanted: Any) -> list[Tensor]:
        return [norm * 1.01 for norm in super().squared_norms(wanted)]


@breaks("knows_the_norm")
class Guesses(Tensorwise):
    def aggregate(self, local: Sent) -> Exchange[Dense]:
        found = yield from super().aggregate(local)
        return GuessesTheNorm(found.blocks)
