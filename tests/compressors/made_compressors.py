"""Two compressors of one tensor at a time, and workers whose parameters show what was applied."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from efsgd import Claims, ErrorFeedbackSGD, Field, TensorCompressor
from efsgd.algorithms.operators import Payload
from efsgd.randomness import Draws
from tests.simulation import copied


@dataclasses.dataclass(frozen=True)
class Mask(TensorCompressor):
    """Every element with some probability, the same ones everywhere: random, and averaged."""

    keep: float = 0.5
    seed: int = 3
    averages: ClassVar[bool] = True

    def claims(self) -> Claims:
        return Claims(self.averages, is_random=True)

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return (Field(shape.numel()),)

    def mask(self, shape: torch.Size, draws: Draws) -> Tensor:
        return torch.rand(shape.numel(), generator=draws.shared()) < self.keep

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        assert delta.isfinite().all()
        return (delta.reshape(-1) * self.mask(delta.shape, draws),)

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return (payload[0] * self.mask(shape, draws)).view(shape)


@dataclasses.dataclass(frozen=True)
class Signs(TensorCompressor):
    """One bit for each element, a scale, and a position, each with another dtype: gathered."""

    factor: float = 1.0
    all_at_once: bool = False

    @property
    def takes_all_at_once(self) -> bool:
        return self.all_at_once

    def compresses(self, shape: torch.Size) -> bool:
        return shape.numel() != 3

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return Field(shape.numel(), bits=1), Field(1), Field(1, torch.int64)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        largest = delta.abs().argmax().view(1)
        return delta.reshape(-1) >= 0, delta.abs().mean().view(1) * self.factor, largest

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        is_positive, scale, largest = payload
        signs = torch.where(is_positive, scale, -scale)
        signs[largest] *= 2
        return signs.view(shape)


def make_workers(
    parameters: Sequence[Tensor], world_size: int, compressor: Any, **options: Any
) -> list[ErrorFeedbackSGD]:
    """Plain SGD steps of length 1, so that parameters show the updates."""
    workers = []
    for _ in range(world_size):
        own = copied(parameters)
        own_options = {"lr": 1.0, "momentum_form": "sgd", "compressor": compressor, **options}
        workers.append(ErrorFeedbackSGD(own, **own_options))
    return workers
