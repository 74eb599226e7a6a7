"""Tensors of one shape are compressed together: as in a loop, to the bit, in few operations."""

from collections.abc import Sequence
from typing import Any, TypeAlias
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from efsgd import (
    LQSGD,
    RandomBlock,
    RandomK,
    SignNorm,
    SymmetricQuantized,
    TopK,
    UniformQuantized,
)
from efsgd.algorithms import operators
from efsgd.algorithms.interfaces import Placement
from efsgd.compressors import random_block, random_k, sign_norm, uniform_quantized
from efsgd.layout import Blocks, Layout
from efsgd.randomness import generator_of
from efsgd.testing.strategies import seeds
from efsgd.wire.collectives import Exchange, run
from efsgd.wire.lockstep import lockstep
from efsgd.wire.transports import Alone
from tests.strategies import examples

COMPRESSORS: list[Any] = [
    TopK(density=0.1),
    TopK(rank=1),
    SignNorm(),
    UniformQuantized(bits=8),
    UniformQuantized(bits=3, stochastic=True),
    SymmetricQuantized(bits=5),
    RandomK(density=0.2),
    RandomBlock(density=0.3),
]
# Vectors, of odd sizes too, and tensors that are the same matrix and have other shapes.
SHAPES = [(), (5,), (24,), (4, 6), (4, 3, 2), (6, 4), (3, 5, 2)]
MANY = [SHAPES[number % len(SHAPES)] for number in range(1000)]


#: Of all tensors.
Shapes: TypeAlias = Sequence[tuple[int, ...]]


def aggregator_of(
    compressor: Any, shapes: Shapes, dtype: torch.dtype, worker: int = 0, world_size: int = 1
) -> Any:
    settings = compressor.settings()
    layout = Layout.plan(compressor.entry(i, shape, settings) for i, shape in enumerate(shapes))
    placement = Placement(dtype, torch.device("cpu"), worker, world_size)
    return compressor.aggregator(layout, settings, placement)


def deltas_for(aggregator: Any, *seed: int) -> Blocks:
    placement = aggregator.placement
    deltas = Blocks(aggregator.layout, placement.dtype, placement.device, aggregator.vectors)
    deltas.flat.normal_(generator=generator_of(*seed, placement.worker))
    deltas.flat[::7] = 0.0
    return deltas


def exchanging(aggregator: Any, deltas: Blocks, step: int) -> Exchange[list[Tensor]]:
    """What is left of what was compressed, and the mean: as bytes."""
    local = yield from aggregator.compress(deltas, step)
    local.subtract_from_(deltas)
    mean = yield from aggregator.aggregate(local)
    return [each.view(torch.uint8) for each in (deltas.flat, mean.blocks.flat)]


def exchanged(
    compressor: Any, shapes: Shapes, dtype: torch.dtype, world_size: int, seed: int
) -> list[list[Tensor]]:
    """The same, of each worker."""
    workers = [
        aggregator_of(compressor, shapes, dtype, worker, world_size) for worker in range(world_size)
    ]
    return lockstep([exchanging(own, deltas_for(own, seed), seed % 7) for own in workers]).results


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@examples(12)
@example(shapes=[(4, 6)] * 1000, dtype=torch.float32, world_size=2, seed=1, at_once=2**18, few=99)
@example(shapes=MANY, dtype=torch.float32, world_size=1, seed=2, at_once=2**18, few=99)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=30),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    world_size=st.integers(1, 3),
    seed=seeds(),
    at_once=st.sampled_from([30, 100, 2**18]),
    few=st.sampled_from([8, 99]),
)
def test_together_is_one_by_one_to_the_bit(
    compressor: Any, shapes: Shapes, dtype: torch.dtype, world_size: int, seed: int, at_once: int,
    few: int,
) -> None:  # fmt: skip
    case = compressor, shapes, dtype, world_size, seed
    with (
        mock.patch.object(operators, "ELEMENTS_AT_ONCE", at_once),
        # From so many elements on, tensors are alone, and draw from generators.
        mock.patch.object(random_k, "FEW", few),
        mock.patch.object(random_block, "SMALL", few),
        mock.patch.object(uniform_quantized, "SMALL", few),
        mock.patch.object(sign_norm, "SUMMED_AT_ONCE", few),
    ):
        together = exchanged(*case)
        with mock.patch.object(operators, "rows_at_once", lambda *_: 1):
            one_by_one = exchanged(*case)
    for some, others in zip(together, one_by_one, strict=True):
        assert all(map(torch.equal, some, others))


def test_what_does_not_fit_the_cache_is_compressed_in_parts() -> None:
    shapes = [(4, 6)] * 7 + [(5,), (3, 8), (4, 6)]
    with mock.patch.object(operators, "ELEMENTS_AT_ONCE", 3 * 24):
        aggregator = aggregator_of(TopK(density=0.1), shapes, torch.float32)
    # One shape after the other, as they lie in memory.
    found = [(unit.shape, unit.rows) for unit in aggregator._units]
    assert found == [((4, 6), 3), ((4, 6), 3), ((4, 6), 2), ((5,), 1), ((3, 8), 1)]


class Counting(TorchDispatchMode):
    """Counts operations on tensors, views among them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(compressor: Any, count: int) -> int:
    """How many it takes one worker to compress so many tensors, and to decompress what arrives."""
    aggregator = aggregator_of(compressor, [(16, 16)] * count, torch.float32)
    deltas = deltas_for(aggregator, 1)
    with Counting() as counting:
        local = run(aggregator.compress(deltas, 1), Alone())
        if not isinstance(compressor, LQSGD):  # that is PowerSGD's
            local.subtract_from_(deltas)
        run(aggregator.aggregate(local), Alone())
    return counting.count


@pytest.mark.parametrize("compressor", [*COMPRESSORS, LQSGD(rank=2)], ids=repr)
def test_a_thousand_tensors_take_as_many_operations_as_ten(compressor: Any) -> None:
    operations(compressor, 2)  # tables are made once in a process
    # Most for rounding at random, whose bits are some forty operations, views included.
    assert operations(compressor, 10) == operations(compressor, 1000) <= 180


class Transposed(TopK):
    def compress_rows(self, deltas: Tensor, draws: Any) -> Any:
        return [field.mT for field in super().compress_rows(deltas, draws)]


def test_rows_that_were_not_announced_are_refused() -> None:
    aggregator = aggregator_of(Transposed(density=0.1), [(4, 6)] * 3, torch.float32)
    with pytest.raises(ValueError, match=r"Transposed.compress_rows.* \[2, 3\] .* \[3, 2\]"):
        run(aggregator.compress(deltas_for(aggregator, 1), 1), Alone())
