"""What is timed is a layer alone, by every worker, and all have the mean."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from efsgd import CollectiveError, Field, TensorCompressor
from efsgd.rank.costs.durations import measured_seconds, modelled_seconds
from efsgd.rank.costs.network import Network
from efsgd.rank.costs.volumes import with_value
from efsgd.testing import lockstep
from efsgd.wire.collectives import AllReduceMean
from tests.rank.test_costs import CASES, layers_with


def test_modelled_seconds_of_a_column_are_those_of_a_step() -> None:
    network = Network(latency=0.5, seconds_per_byte=0.25)
    table = modelled_seconds([[8, 16], [0, 4]], network, collectives=2)
    assert table == [[2.5, 4.5], [0.5, 1.5]]
    assert [sum(column) for column in zip(*table, strict=True)] == [
        network.seconds(8),
        network.seconds(20),
    ]


class MadeClock:
    """Time passes when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = MadeClock()
CALLS: list[float] = []


@dataclasses.dataclass(frozen=True)
class Slow(TensorCompressor):
    """Takes `size` seconds for each element, and a hundred more where it is new."""

    size: int = 1

    def fields(self, shape: torch.Size) -> tuple[Field, ...]:
        return (Field(1),)

    def compress(self, delta: torch.Tensor, draws: Any) -> tuple[torch.Tensor, ...]:
        CLOCK.now += self.size * delta.numel() + (100 if self.size not in CALLS else 0)
        CALLS.append(self.size)
        return (delta.sum().view(1),)

    def decompress(self, payload: Any, shape: torch.Size, draws: Any) -> torch.Tensor:
        return torch.zeros(shape)

    def compresses(self, shape: torch.Size) -> bool:
        return self.size < 9


def durations(clocks: list[Callable[[], float]], repeats: int = 3) -> Any:
    CALLS.clear()
    compressor, values = Slow(), (1, 2, 9)
    layers = layers_with(compressor, "size", values, [(2, 3), (5,), (2, 3)])
    return lockstep(
        [
            measured_seconds(compressor, layers, "size", values, repeats=repeats, clock=clock)
            for clock in clocks
        ]
    )


def test_measured_seconds_are_medians_and_the_mean_of_the_workers() -> None:
    found = durations([CLOCK, lambda: 2 * CLOCK.now])
    expected = [[9.0, 18.0, 0.0], [7.5, 15.0, 0.0], [9.0, 18.0, 0.0]]
    assert found.results == [expected, expected]
    assert [traced.kind for traced in found.trace] == [AllReduceMean.__name__]
    assert found.trace[0].shape == (3, 3)


def test_equal_layers_are_measured_once() -> None:
    durations([CLOCK], repeats=4)
    assert len(CALLS) == 2 * 2 * (4 + 1)


def test_one_worker_measures_alone() -> None:
    found = durations([CLOCK])
    assert found.results[0][0] == [6.0, 12.0, 0.0]


def test_a_worker_that_cannot_measure_leaves_none_waiting() -> None:
    def broken() -> float:
        raise RuntimeError("no clock")

    with pytest.raises(CollectiveError, match="another worker could not measure") as caught:
        durations([CLOCK, broken])
    assert caught.value.__notes__ == ["worker 1: RuntimeError: no clock"]


@pytest.mark.parametrize(("compressor", "setting", "values"), CASES)
def test_every_compressor_can_be_measured(
    compressor: Any, setting: str, values: tuple[float, ...]
) -> None:
    layers = layers_with(compressor, setting, values)
    torch.set_default_device("meta")
    try:
        found = lockstep(
            [measured_seconds(compressor, layers, setting, values, repeats=1) for _ in range(2)]
        )
    finally:
        torch.set_default_device(None)
    assert found.results[0] == found.results[1]
    for layer, row in zip(layers, found.results[0], strict=True):
        for value, seconds in zip(values, row, strict=True):
            own = with_value(compressor, layer.settings, setting, value)
            assert (seconds > 0) == (own.level(layer.shape, own.settings()) is not None)
