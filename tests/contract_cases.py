"""Compressors as others would write them: good ones, and for each law some that break it."""

import dataclasses
import itertools
import multiprocessing
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from efsgd import Field, PowerSGD, TensorCompressor
from efsgd.blocks import Blocks, Elementwise
from efsgd.collectives import AllGather, Exchange
from efsgd.compressors import Claims
from efsgd.powersgd import LowRank, PowerIteration
from efsgd.tensorwise import Dense, Sent, Tensorwise
from efsgd.units import Draws, Payload, Unit

# ---- good ones ----------------------------------------------------------------------------------


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

# ---- what is sent -------------------------------------------------------------------------------


class WrongBytes(Largest):
    def payload_bytes(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, step: int = 0
    ) -> int:
        return super().payload_bytes(shapes, dtype, step) + 4 * any(len(s) == 2 for s in shapes)


class SendsNonzeros(Half):
    """As many values as there are."""

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return (delta[delta != 0].flatten(),)


@dataclasses.dataclass(frozen=True)
class LowRankOf(PowerSGD):
    """PowerSGD with another aggregator."""

    kind: ClassVar[type[PowerIteration]] = PowerIteration

    def aggregator(self, layout: Any, settings: Mapping[str, Any], *args: Any) -> PowerIteration:
        options = {"seed": settings["seed"], "warm_start": settings["warm_start"]}
        return self.kind(layout, *args[:2], **options)


class AsksMoreIfHuge(PowerIteration):
    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[LowRank]:
        found = yield from super().compress(deltas, step)
        if float(deltas.flat.abs().max()) > 1e9:
            yield AllGather(torch.zeros(3), "more")
        return found


class Greedy(LowRankOf):
    kind = AsksMoreIfHuge


class AsksMoreInOddSteps(PowerIteration):
    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[LowRank]:
        found = yield from super().compress(deltas, step)
        if step % 2:
            yield AllGather(torch.zeros(3), "more")
        return found


class Beatless(LowRankOf):
    """Announces the bytes of each step, and does not tell the steps apart."""

    kind = AsksMoreInOddSteps

    def payload_bytes(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, step: int = 0
    ) -> int:
        return super().payload_bytes(shapes, dtype, step) + 12 * (step % 2)


# ---- compressing and decompressing --------------------------------------------------------------


class OtherShape(Largest):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return super().decompress(payload, shape, draws).sum(0, keepdim=True)


class DecompressesAtRandom(Half):
    def mask(self, shape: torch.Size, draws: Draws) -> Tensor:
        return torch.rand(shape) < 0.5


class DecompressesPrivately(Half):
    def mask(self, shape: torch.Size, draws: Draws) -> Tensor:
        return torch.rand(shape, generator=draws.private()) < 0.5


class IgnoresAlpha(Largest):
    def add_decompressed_(self, out: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        out.add_(self.decompress(payload, out.shape, draws))


class WritesToPayload(Half):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return payload[0].view(shape).mul_(self.mask(shape, draws)).clone().mul_(1.0)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return (delta.flatten().clone(),)


class ZeroIsSomething(Rounded):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        codes, scale = payload
        return ((codes.to(scale.dtype) - 7) * (scale / 7)).view(shape) + 1e-30


class WritesToDelta(Half):
    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return (delta.mul_(self.mask(delta.shape, draws)).flatten().clone(),)


@dataclasses.dataclass(frozen=True)
class SendsAView(TensorCompressor):
    averages: ClassVar[bool] = True

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return (Field(shape.numel()),)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return (delta.view(-1),)

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return payload[0].view(shape)


class NormalizesDeltas(PowerIteration):
    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[LowRank]:
        deltas.flat.mul_(0.5)
        return (yield from super().compress(deltas, step))


class Normalizing(LowRankOf):
    kind = NormalizesDeltas


# ---- values -------------------------------------------------------------------------------------


class ScratchInGradients(LowRank):
    def decompress_with_(
        self, function: Elementwise, *operands: Mapping[int, Tensor], **options: Any
    ) -> None:
        super().decompress_with_(function, *operands, **options)
        for parameter in operands[0].values():
            if parameter.grad is not None and self.layout.batches:
                parameter.grad.zero_()


class UsesGradients(PowerIteration):
    def aggregate(self, local: LowRank) -> Exchange[LowRank]:
        found = yield from super().aggregate(local)
        fields = {each.name: getattr(found, each.name) for each in dataclasses.fields(found)}
        return ScratchInGradients(**fields)


class Scratching(LowRankOf):
    kind = UsesGradients


class DividesByTheNorm(Rounded):
    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        scale = delta.abs().max().view(1)
        codes = (delta / scale * 7 + self.noise(delta, draws)).floor().nan_to_num(0.0)
        return codes.long().flatten() + 7, scale / scale * scale


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


class TensorwiseOf(Largest):
    """One tensor at a time, with another aggregator."""

    kind: ClassVar[type[Tensorwise]] = Tensorwise

    def aggregator(
        self, layout: Any, settings: Any, dtype: Any, device: Any, worker: int = 0, *rest: Any
    ) -> Tensorwise:
        return self.kind(layout, dtype, device, worker, averages=self.averages)


class DiesOfZeros(Tensorwise):
    """Sends nothing if the last step had nothing."""

    gain = 1.0

    def add_(
        self, flat: Tensor, payloads: Sequence[Payload], step: int, alpha: float = 1.0
    ) -> None:
        super().add_(flat, payloads, step, alpha * self.gain)

    def commit_(self, absent: frozenset[int]) -> None:
        self.gain = float((self._mean.flat != 0).any())


class Mortal(TensorwiseOf):
    kind = DiesOfZeros


class KnowsTheWorker(Tensorwise):
    def aggregate(self, local: Sent) -> Exchange[Dense]:
        found = yield from super().aggregate(local)
        found.blocks.flat.mul_(1 + 1e-6 * self._worker)
        return found


class Partial(TensorwiseOf):
    kind = KnowsTheWorker


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


class CodesTooLarge(Rounded):
    """On the wire the codes lose their highest bit; here they do not."""

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return Field(shape.numel(), bits=3), Field(1)


class GuessesTheNorm(Dense):
    def squared_norms(self, wanted: Any) -> list[Tensor]:
        return [norm * 1.01 for norm in super().squared_norms(wanted)]


class Guesses(Tensorwise):
    def aggregate(self, local: Sent) -> Exchange[Dense]:
        found = yield from super().aggregate(local)
        return GuessesTheNorm(found.layout, found.blocks)


class Guessing(TensorwiseOf):
    kind = Guesses


# ---- claims -------------------------------------------------------------------------------------


class ClaimsTooMuch(Largest):
    def claims(self) -> Claims:
        return Claims(False, contraction=lambda shape: 0.4)


class Expands(Largest):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return super().decompress((payload[0] * 2.5, payload[1]), shape, draws)

    def claims(self) -> Claims:
        return Claims(False, contraction=lambda shape: 0.0)


class ClaimsTooMuchInTheMean(Half):
    def claims(self) -> Claims:
        return Claims(True, is_random=True, contraction=lambda shape: 0.7)


class RoundsToNearest(Rounded):
    """Almost without bias: it keeps to zero."""

    def noise(self, delta: Tensor, draws: Draws) -> Tensor:
        return 0.4 + 0.2 * super().noise(delta, draws)


class RoundsDown(Rounded):
    def noise(self, delta: Tensor, draws: Draws) -> Tensor:
        return 0.9 * super().noise(delta, draws)


class Shrinks(Rounded):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return 0.96 * super().decompress(payload, shape, draws)


# ---- runs ---------------------------------------------------------------------------------------


class DrawsGlobally(Rounded):
    def noise(self, delta: Tensor, draws: Draws) -> Tensor:
        return torch.rand(delta.shape, dtype=delta.dtype)


class DrawsFromRandom(Rounded):
    def noise(self, delta: Tensor, draws: Draws) -> Tensor:
        return torch.full_like(delta, random.random())


class Counts(Rounded):
    """Draws from a count of its own, in place of the number of the step."""

    count: ClassVar[Any] = itertools.count()

    def noise(self, delta: Tensor, draws: Draws) -> Tensor:
        own = dataclasses.replace(draws, step=next(self.count))
        return super().noise(delta, own)


class KeepsTooEarly(PowerIteration):
    def aggregate(self, local: LowRank) -> Exchange[LowRank]:
        found = yield from super().aggregate(local)
        super().commit_()
        return found


class Hasty(LowRankOf):
    kind = KeepsTooEarly


class HidesNonfinite(Tensorwise):
    shows_nonfinite = True


class Hiding(TensorwiseOf):
    kind = HidesNonfinite


class CountsCommits(Tensorwise):
    count = 0

    def commit_(self, absent: frozenset[int]) -> None:
        self.count += 1

    def _draws(self, unit: Unit, step: int, worker: int | None = None) -> Draws:
        return super()._draws(unit, self.count, worker)


@dataclasses.dataclass(frozen=True)
class Forgetful(Half):
    def aggregator(
        self, layout: Any, settings: Any, dtype: Any, device: Any, worker: int = 0, *rest: Any
    ) -> Tensorwise:
        return CountsCommits(layout, dtype, device, worker, averages=True)


class CleansUpEarly(Tensorwise):
    def aggregate(self, local: Sent) -> Exchange[Dense]:
        if len(local.in_flight) == 1:
            return (yield from super().aggregate(local))
        yield local.in_flight[0]
        answer = yield local.in_flight[1]
        self._bytes.zero_()
        flat = self._mean.flat.zero_()
        for own in answer.unbind():
            self.add_(flat, self._format.unpack(own), local.step, 1 / len(answer))
        return Dense(self.layout, self._mean)


class Tidy(TensorwiseOf):
    kind = CleansUpEarly


class KnowsTheProcess(Largest):
    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        value, where = super().compress(delta, draws)
        is_child = multiprocessing.parent_process() is not None
        return value * (0.5 if is_child else 1.0), where


class FailsInProcesses(Largest):
    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        if draws.worker == 1 and multiprocessing.parent_process() is not None:
            raise ValueError("only in a process")
        return super().compress(delta, draws)


#: The law that each breaks.
BROKEN: list[tuple[str, Any]] = [
    ("sends_what_it_announces", WrongBytes()),
    ("has_one_schedule", SendsNonzeros()),
    ("has_one_schedule", Greedy(rank=1)),
    ("has_one_schedule", Beatless(rank=1)),
    ("decompresses_alike", OtherShape()),
    ("decompresses_alike", DecompressesAtRandom()),
    ("decompresses_alike", IgnoresAlpha()),
    ("decompresses_alike", WritesToPayload()),
    ("decompresses_alike", ZeroIsSomething()),
    ("leaves_deltas_alone", WritesToDelta()),
    ("leaves_deltas_alone", SendsAView()),
    ("leaves_deltas_alone", Normalizing(rank=1)),
    ("keeps_shapes_and_dtypes", Scratching(rank=1)),
    ("survives_zeros", DividesByTheNorm()),
    ("survives_zeros", Mortal()),
    ("survives_scales", Overflowing()),
    ("keeps_workers_equal", Partial()),
    ("loses_nothing", AveragesRoots()),
    ("loses_nothing", CodesTooLarge()),
    ("knows_the_norm", Guessing()),
    ("contracts_as_claimed", ClaimsTooMuch()),
    ("contracts_as_claimed", Expands()),
    ("contracts_as_claimed", ClaimsTooMuchInTheMean()),
    ("is_unbiased_as_claimed", RoundsToNearest()),
    ("is_unbiased_as_claimed", RoundsDown()),
    ("is_unbiased_as_claimed", Shrinks()),
    ("repeats_to_the_bit", DrawsGlobally()),
    ("repeats_to_the_bit", DrawsFromRandom()),
    ("repeats_to_the_bit", Counts()),
    ("refuses_without_a_trace", Hasty(rank=1)),
    ("refuses_without_a_trace", Hiding()),
    ("resumes_to_the_bit", Forgetful()),
    ("agrees_when_alone", Tidy()),
]
