"""Compressors that break laws of parameters and errors."""

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
from efsgd.layout import Elementwise
from efsgd.randomness import Draws
from efsgd.wire.collectives import Exchange
from tests.testing.broken_compressors import breaks
from tests.testing.good_compressors import Rounded


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
