"""What compressors of single tensors miss, beside compressing each by hand."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efsgd import RandomK, TopK, UniformQuantized
from efsgd.algorithms.operators import Payload
from efsgd.randomness import Draws
from efsgd.rank import Layer, Value
from efsgd.rank.approximation.tables import ErrorTables
from efsgd.testing import Lockstep, lockstep
from efsgd.testing.gradients import gaussian
from efsgd.testing.strategies import seeds
from efsgd.wire.collectives import AllReduceMean
from tests.rank.l_greco_runs import missed
from tests.rank.test_costs import layers_with
from tests.simulation import bits

SHAPES = [(12, 10), (7,), (4, 3, 2)]
CASES: list[tuple[Any, str, Sequence[Value]]] = [
    (TopK(density=0.1), "density", (0.02, 0.1, 0.5, 1.0)),
    (TopK(rank=1), "rank", (1, 2, 8)),  # with 8 the matrices are sent whole
    (UniformQuantized(bits=4), "bits", (1, 2, 4, 8)),
    (UniformQuantized(bits=4, stochastic=True, seed=5), "bits", (2, 4)),
    (RandomK(density=0.1, seed=3), "density", (0.05, 0.1, 0.5)),
]
# Sums of at most 120 squares in float64, by another order.
ROUNDING = 1e-13


def layers_for(compressor: Any, setting: str, values: Sequence[Value]) -> list[Layer]:
    return layers_with(compressor, setting, values, SHAPES, torch.float64)


def measured(
    case: tuple[Any, str, Sequence[Value]], tensors: Sequence[dict[int, Tensor]]
) -> Lockstep[list[list[float]]]:
    compressor, setting, values = case
    layers = layers_for(*case)
    return lockstep(
        [
            ErrorTables(setting, values).tried(compressor, layers, own, worker)
            for worker, own in enumerate(tensors)
        ]
    )


def tensors_of(world_size: int, *seed: int) -> list[dict[int, Tensor]]:
    return [
        {index: gaussian(shape, *seed, worker, index) for index, shape in enumerate(SHAPES)}
        for worker in range(world_size)
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]!r}")
@settings(max_examples=10)
@given(seed=seeds(), world_size=st.integers(1, 4))
def test_the_table_is_that_of_a_loop_over_layers_values_and_workers(
    case: tuple[Any, str, Sequence[Value]], seed: int, world_size: int
) -> None:
    compressor, setting, values = case
    tensors = tensors_of(world_size, seed)
    before = bits(tensors)
    done = measured(case, tensors)
    assert bits(tensors) == before
    assert all(rows == done.results[0] for rows in done.results)
    layers = layers_for(*case)
    nbytes = 8 * len(layers) * len(values)  # of the table, which is all that is sent
    assert [(each.kind, each.nbytes) for each in done.trace] == [("AllReduceMean", nbytes)]
    for row, layer in zip(done.results[0], layers, strict=True):
        for found, value in zip(row, values, strict=True):
            own = dataclasses.replace(compressor, **{setting: value})
            expected = missed(own, layer.index, tensors)
            assert found == pytest.approx(expected, rel=ROUNDING, abs=1e-13)
            assert own.compresses(layer.shape) or found == 0.0  # what is sent whole loses nothing
        assert row[0] > 0


@dataclasses.dataclass(frozen=True)
class Strict(TopK):
    """Refuses what compressors are never given, and what it does not like."""

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        if not delta.isfinite().all():
            raise RuntimeError("not finite")
        if bool((delta == 7.0).all()):
            raise RuntimeError("seven")
        return super().compress(delta, draws)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_compressors_are_not_given_what_has_overflowed(value: float) -> None:
    tensors = tensors_of(2, 0)
    tensors[1][0][3, 4] = value
    rows = measured((Strict(density=0.1), "density", (0.1, 0.5)), tensors).results[0]
    assert [all(map(math.isfinite, row)) for row in rows] == [False, True, True]


def test_what_a_compressor_raises_comes_after_the_collective() -> None:
    tensors = tensors_of(2, 0)
    tensors[1][2].fill_(7.0)
    case = (Strict(density=0.1), "density", (0.1, 0.5))
    compressor, setting, values = case
    asked = []
    for worker, own in enumerate(tensors):
        exchange = ErrorTables(setting, values).tried(compressor, layers_for(*case), own, worker)
        asked.append((exchange, next(exchange)))
    assert [type(request) for _, request in asked] == [AllReduceMean, AllReduceMean]
    with pytest.raises(RuntimeError, match="seven"):
        asked[1][0].send(torch.full((3, 2), math.nan))
