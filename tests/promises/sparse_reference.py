"""Compressors that send some elements as they are, from their definitions, as naively as can be."""

from typing import Any

import torch
from torch import Tensor

from efsgd import TensorCompressor
from efsgd.compressors.identity import Identity
from efsgd.compressors.random_block import RandomBlock
from efsgd.compressors.random_k import FEW, RandomK, draw_subset
from efsgd.compressors.top_k import TopK
from efsgd.layout import matrix_shape
from efsgd.randomness import Draws, random_bits
from tests.strategies import Scenario

SPARSE: list[TensorCompressor] = [
    TopK(density=0.1),
    TopK(rank=1),
    TopK(density=0.05, scope="model"),
    RandomK(density=0.1),
    RandomK(rank=1, seed=3),
    RandomBlock(density=0.1),
    RandomBlock(rank=1, seed=3),
]
ALL = [*SPARSE, Identity()]
SHAPES = [(12, 10), (10,), (6, 5, 3), (), (0, 4), (12, 10), (300,)]


def naive_floats(shape: tuple[int, ...], rank: int) -> int:
    n, m = matrix_shape(shape)
    return min(n, m, rank) * (n + m)


def naive_positions(compressor: Any, delta: Tensor, draws: Draws) -> list[int]:
    """What is sent of a tensor, from the definition."""
    numel, values = delta.numel(), delta.reshape(-1).tolist()
    if compressor.rank is None:
        k = max(1, int(compressor.density * numel))
    else:
        k = naive_floats(tuple(delta.shape), compressor.rank)
    # Random bits, and subsets of long tensors, have tests of their own.
    path, number = (draws.seed, draws.step), torch.tensor([draws.index])
    if isinstance(compressor, RandomK):
        if numel > FEW:
            return draw_subset(numel, k, draws.shared()).tolist()
        bits = random_bits(path, number, numel)[0].tolist()
        return sorted(sorted(range(numel), key=lambda position: bits[position])[:k])
    if isinstance(compressor, RandomBlock):
        start = int(random_bits(path, number, 1)) % 2**62 % numel
        return [(start + offset) % numel for offset in range(k)]
    k = max(1, k // 2) if compressor.rank is not None else k
    return sorted(range(numel), key=lambda position: -abs(values[position]))[:k]


class NaiveRun:
    """Algorithm 2 in float64, one tensor, or all in one, and one worker at a time."""

    def __init__(self, compressor: Any, scenario: Scenario) -> None:
        self.compressor, self.step_number = compressor, 0
        self.x = scenario.parameters()
        self.m = [torch.zeros_like(x) for x in self.x]
        self.errors = [[torch.zeros_like(x) for x in self.x] for _ in range(scenario.world_size)]

    def compressed(self, deltas: list[Tensor]) -> list[Tensor]:
        """What one worker's tensors become."""
        if self.compressor.takes_all_at_once:
            flat = torch.cat([delta.reshape(-1) for delta in deltas])
            sizes = [delta.numel() for delta in deltas]
            parts = self.one(0, flat).split(sizes)
            return [part.view(d.shape) for part, d in zip(parts, deltas, strict=True)]
        return [self.one(index, delta) for index, delta in enumerate(deltas)]

    def one(self, index: int, delta: Tensor) -> Tensor:
        is_joined = self.compressor.takes_all_at_once
        if delta.numel() == 0 or not (is_joined or self.compressor.compresses(delta.shape)):
            return delta
        seed = getattr(self.compressor, "seed", 0)
        sent = torch.zeros_like(delta)
        draws = Draws(seed, index, self.step_number, None)
        for position in naive_positions(self.compressor, delta, draws):
            sent.view(-1)[position] = delta.view(-1)[position]
        return sent

    def step(self, gradients: list[list[Tensor]]) -> list[Tensor]:
        """Δ' of each tensor."""
        updates = [torch.zeros_like(x) for x in self.x]
        for own, errors in zip(gradients, self.errors, strict=True):
            deltas = [g + e for g, e in zip(own, errors, strict=True)]
            sent = self.compressed(deltas)
            for index, (delta, part) in enumerate(zip(deltas, sent, strict=True)):
                errors[index] = delta - part
                updates[index] = updates[index] + part / len(gradients)
        for index, update in enumerate(updates):
            self.m[index] = 0.9 * self.m[index] + update
            self.x[index] = self.x[index] - 0.1 * (update + self.m[index])
        self.step_number += 1
        return updates
