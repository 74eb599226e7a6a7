"""What a layer is said to cost is what buffers have."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from efsgd import LQSGD, ErrorFeedbackSGD, PowerSGD, TensorCompressor, TopK, UniformQuantized
from efsgd.algorithms.interfaces import Compressor
from efsgd.compressors.powersgd_plus import PowerSGDPlus
from efsgd.engine.parameters import list_parameters
from efsgd.rank.costs.volumes import byte_table, total_bytes, with_value
from efsgd.rank.layers import Layer, layers_of
from tests.strategies import Shape, gaussian

SHAPES: list[Shape] = [(24, 16), (12, 3, 3, 2), (16, 24), (24, 16)]
RANKS = (1, 3, 9, 40)


def layers_with(
    compressor: Compressor,
    setting: str,
    values: Sequence[float],
    shapes: Sequence[Shape] = SHAPES,
    dtype: torch.dtype = torch.float32,
) -> list[Layer]:
    own = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    optimizer = ErrorFeedbackSGD(own, lr=0.1, compressor=compressor)
    groups = optimizer.param_groups
    return layers_of(list_parameters(groups), groups, compressor, setting, values, optimizer)


def sent(compressor: Compressor, shapes: list[Shape]) -> list[int]:
    """What buffers of steps 1 and 2 have, control words apart."""
    own = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    optimizer = ErrorFeedbackSGD(own, lr=0.1, compressor=compressor)
    found = []
    for step in range(3):
        for index, parameter in enumerate(own):
            parameter.grad = gaussian(shapes[index], step, index).float()
        optimizer.step()
        found.append(optimizer.communication_stats()["bytes_sent"] - 4 * (len(shapes) + 1))
    return found[1:]


CASES: list[tuple[Any, str, tuple[float, ...]]] = [
    (PowerSGD(), "rank", RANKS),
    (PowerSGD(min_compression_rate=0.0), "rank", RANKS),
    (PowerSGDPlus(), "rank", RANKS),
    (LQSGD(bits=3), "rank", RANKS),
    (TopK(density=0.1), "density", (0.01, 0.3, 1.0)),
    (UniformQuantized(), "bits", (1, 3, 16)),
]


@pytest.mark.parametrize(("compressor", "setting", "values"), CASES)
def test_each_layer_and_all_together_cost_what_buffers_have_and_no_more_than_the_sum(
    compressor: Any, setting: str, values: tuple[float, ...]
) -> None:
    layers = layers_with(compressor, setting, values)
    table = byte_table(compressor, layers, setting, values)
    for column, value in enumerate(values):
        own = dataclasses.replace(compressor, **{setting: value})
        for layer, row in zip(layers, table, strict=True):
            assert [row[column]] * 2 == sent(own, [layer.shape])
        total = total_bytes(compressor, layers, setting, [value] * len(layers))
        assert [total] * 2 == sent(own, SHAPES)
        assert total <= sum(row[column] for row in table)


def test_values_that_layers_have_now_make_no_difference() -> None:
    compressor, shapes = LQSGD(bits=3), [(11, 7)] * 4  # 11 codes of 3 bits share bytes with others
    layers = layers_with(compressor, "rank", RANKS, shapes)
    others = [
        dataclasses.replace(layer, value=index, settings={**layer.settings, "rank": index + 1})
        for index, layer in enumerate(layers)
    ]
    for own in (layers, others):
        assert [total_bytes(compressor, own, "rank", [1] * 4)] * 2 == sent(
            dataclasses.replace(compressor, rank=1), shapes
        )
    assert byte_table(compressor, others, "rank", RANKS) == byte_table(
        compressor, layers, "rank", RANKS
    )


def test_of_steps_that_take_turns_the_mean_counts() -> None:
    compressor = PowerSGD(alternating=True)
    (layer,) = layers_with(compressor, "rank", (2,), [(24, 16)])
    assert sorted(sent(PowerSGD(rank=2, alternating=True), [(24, 16)])) == [128, 192]
    assert total_bytes(compressor, [layer], "rank", [2]) == 160


def test_refreshes_count_where_every_step_is_one() -> None:
    for every, expected in ((1, 24 * 16 + 2 * 16), (50, 2 * (24 + 16))):
        compressor = PowerSGDPlus(rank=2, refresh_every=every)
        (layer,) = layers_with(compressor, "rank", (2,), [(24, 16)])
        assert total_bytes(compressor, [layer], "rank", [2]) == 4 * expected


def test_a_gathered_byte_takes_as_long_as_half_as_many_as_there_are_workers() -> None:
    compressor = TopK(density=0.1)
    layers = layers_with(compressor, "density", (0.1, 1.0))
    chosen = [0.1, 1.0, 0.1, 0.1]  # one is sent as it is, in the all-reduce
    compressed = total_bytes(compressor, layers, "density", chosen) - 4 * 12 * 18
    for workers in (2, 6):
        total = total_bytes(compressor, layers, "density", chosen, workers, as_all_reduce=True)
        assert total == 4 * 12 * 18 + compressed * workers / 2
    averaged = layers_with(PowerSGD(), "rank", RANKS)
    plain = total_bytes(PowerSGD(), averaged, "rank", [3] * 4, 6)
    assert total_bytes(PowerSGD(), averaged, "rank", [3] * 4, 6, as_all_reduce=True) == plain


def test_the_number_of_workers_counts_where_it_makes_a_difference() -> None:
    compressor = LQSGD(aggregation="scatter")
    layers = layers_with(compressor, "rank", RANKS)
    shapes = [layer.shape for layer in layers]
    for workers in (2, 5):
        expected = LQSGD(rank=3, aggregation="scatter").payload_bytes(shapes, world_size=workers)
        assert total_bytes(compressor, layers, "rank", [3] * 4, workers) == expected


def test_a_layer_keeps_its_own_other_settings() -> None:
    own = with_value(PowerSGD(), {"rank": 2, "min_compression_rate": 9.0, "lr": 0.1}, "rank", 5)
    assert own == PowerSGD(rank=5, min_compression_rate=9.0)
    plus = with_value(PowerSGDPlus(), {"rank": 2, "alternating": False}, "rank", 5)
    assert plus == PowerSGDPlus(rank=5)


def test_a_compressor_without_such_a_field_is_refused() -> None:
    class NoDataclass(TensorCompressor):
        pass

    with pytest.raises(TypeError, match=r"Invalid compressor.*no dataclass with a field 'rank'"):
        with_value(NoDataclass(), {}, "rank", 3)
    with pytest.raises(TypeError, match=r"no dataclass with a field 'bits'"):
        with_value(PowerSGD(), {}, "bits", 3)
    with pytest.raises(ValueError, match="Invalid rank: 0"):
        with_value(PowerSGD(), {}, "rank", 0)
