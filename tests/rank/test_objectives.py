"""What L-GreCo makes least: bytes, milliseconds, or anything else."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from efsgd import CollectiveError, Field, PowerSGD, TensorCompressor, TopK
from efsgd.algorithms.interfaces import Compressor
from efsgd.rank import LGreCo, Network, StepTime, Value
from efsgd.rank.costs.objectives import compression_seconds
from efsgd.rank.costs.volumes import with_value
from efsgd.testing import Lockstep, lockstep
from efsgd.wire.collectives import AllReduceMean, Exchange
from tests.rank.l_greco_runs import Shape, Workers, assert_least, low_rank_error, mean_of
from tests.rank.made_time import MadeClock
from tests.rank.test_costs import CASES, layers_with

SHAPES: list[Shape] = [(16, 12), (12, 20), (10, 4, 3)]
OPTIONS: dict[str, Any] = {"lr": 0.01, "min_compression_rate": 0.0, "rank": 3}
NETWORK = Network(latency=0.5, seconds_per_byte=0.001)


def ticking(seconds: float) -> Callable[[], float]:
    """A clock on which this time passes between any two looks."""
    return (seconds * look for look in itertools.count()).__next__


def tables(
    costs: Sequence[StepTime], compressor: Compressor, setting: str, values: tuple[float, ...]
) -> Lockstep[list[list[float]]]:
    """By a worker for each of these."""
    layers, count = layers_with(compressor, setting, values, SHAPES), len(costs)
    return lockstep([own(compressor, layers, setting, values, count) for own in costs])


def test_modelled_milliseconds_are_latency_and_bytes_and_nothing_is_sent_for_them() -> None:
    own = StepTime(NETWORK, compression=False)
    done = tables([own, own], PowerSGD(rank=2), "rank", (1, 2))
    lengths = [16 + 12, 12 + 20, 10 + 12]
    latency = 2 * 0.5 / 3  # of two collectives, a third for each layer
    expected = [[1000 * (latency + 0.001 * 4 * r * own) for r in (1, 2)] for own in lengths]
    for found in done.results:
        assert found == [pytest.approx(row, rel=1e-14) for row in expected]  # float64 products
    assert done.trace == []


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_what_is_gathered_counts_once_for_each_worker_beside_half_an_all_reduce(
    workers: int,
) -> None:
    own = StepTime(Network(0.0, 0.001), compression=False)
    (row, *_), *_ = tables([own] * workers, TopK(density=0.1), "density", (0.1,)).results
    # 19 of 192 elements: a value and a position of 4 bytes each.
    assert row == pytest.approx([19 * 8 * workers / 2], rel=1e-14)  # float64 products


def test_compression_is_timed_and_added_where_there_is_any() -> None:
    costs = [StepTime(NETWORK, clock=ticking(0.25 * (1 + 2 * w))) for w in range(2)]
    modelled = StepTime(NETWORK, compression=False)
    compressor, values = PowerSGD(rank=2, min_compression_rate=1.0), (2, 12)
    done = tables(costs, compressor, "rank", values)
    plain = tables([modelled] * 2, compressor, "rank", values).results[0]
    # 250 ms on one worker and 750 ms on the other; at rank 12 nothing is compressed.
    expected = [pytest.approx([row[0] + 500.0, row[1]], rel=1e-14) for row in plain]
    assert done.results == [expected, expected]  # sums and products of float64
    assert [each.purpose for each in done.trace] == ["seconds of compression"]


def test_the_network_is_measured_where_none_is_given() -> None:
    costs = [StepTime(compression=False, repeats=2, clock=ticking(0.25)) for _ in range(2)]
    done = tables(costs, PowerSGD(rank=2), "rank", (1, 2))
    # All-reduces of any size take 250 ms on this clock: a third of two of them for each layer.
    assert done.results == [[pytest.approx([500 / 3] * 2, rel=1e-14)] * 3] * 2
    assert len(done.trace) == 2 * (2 + 1) + 1


def chosen_by(costs: Any) -> tuple[Workers, list[dict[Value, float]]]:
    """Workers that have decided by costs, and the errors of the ranks 2 to 6."""
    numbers = itertools.count()
    workers = Workers(
        lambda: LGreCo(3, values=range(2, 7), spectrum="svd", costs=costs(next(numbers))),
        2,
        SHAPES,
        **OPTIONS,
    )
    workers.window(3)
    means = mean_of(workers.summed(3))
    return workers, [{r: low_rank_error(A, r) for r in range(2, 7)} for A in means]


def test_ranks_by_modelled_time_are_those_by_bytes_where_only_bytes_take_time() -> None:
    network = Network(0.0, 1e-9)
    by_time, _ = chosen_by(lambda _: StepTime(network, compression=False))
    by_bytes, _ = chosen_by(lambda _: None)
    assert by_time.values == by_bytes.values != [3, 3, 3]


def test_costs_may_come_of_what_workers_tell_each_other() -> None:
    def costs(worker: int) -> Any:
        def own(_: Any, __: Any, ___: str, values: Any, ____: int) -> Exchange[list[list[float]]]:
            # A worker's cost of a rank in each layer; neither decides by itself.
            prices = torch.tensor([[1.0, 9.0], [9.0, 1.0], [2.0, 30.0]], dtype=torch.float64)
            mean = yield AllReduceMean(prices[:, worker].clone(), "prices")
            return [[price * value for value in values] for price in mean.tolist()]

        return own

    workers, errors = chosen_by(costs)
    sizes = [{r: price * r for r in range(2, 7)} for price in (5.0, 5.0, 16.0)]
    assert_least(workers.values, sizes, errors, [3, 3, 3])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([[1.0] * 5] * 2, "Must be 3 rows, one for each layer, of 5 numbers, one for each value."),
        ([[1.0] * 4] * 3, "Must be 3 rows, one for each layer, of 5 numbers, one for each value."),
        ([[-1.0] * 5] * 3, "Invalid candidate 0 of layer 0"),
        ([[math.nan] * 5] * 3, "Invalid candidate 0 of layer 0"),
    ],
)
def test_costs_must_be_a_table_of_numbers(table: Any, message: str) -> None:
    def costs(*_: Any) -> Exchange[list[list[float]]]:
        yield from ()
        return table

    with pytest.raises(ValueError, match=message):
        chosen_by(lambda _: costs)


# ---- the time of compression ---------------------------------------------------------------------

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


def durations(clocks: list[Callable[[], float]]) -> Any:
    CALLS.clear()
    compressor, values = Slow(), (1, 2, 9)
    layers = layers_with(compressor, "size", values, [(2, 3), (5,), (2, 3)])
    own = compressor, layers, "size", values
    return lockstep([compression_seconds(*own, repeats=3, clock=clock) for clock in clocks])


def test_measured_seconds_are_medians_and_the_mean_of_the_workers_once_for_equal_layers() -> None:
    assert durations([CLOCK]).results[0][0] == [6.0, 12.0, 0.0]
    assert len(CALLS) == 2 * 2 * (3 + 1)
    found = durations([CLOCK, lambda: 2 * CLOCK.now])
    expected = [[9.0, 18.0, 0.0], [7.5, 15.0, 0.0], [9.0, 18.0, 0.0]]
    assert found.results == [expected, expected]
    assert [traced.kind for traced in found.trace] == [AllReduceMean.__name__]
    assert found.trace[0].shape == (3, 3)


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
            [compression_seconds(compressor, layers, setting, values, repeats=1) for _ in range(2)]
        )
    finally:
        torch.set_default_device(None)
    assert found.results[0] == found.results[1]
    for layer, row in zip(layers, found.results[0], strict=True):
        for value, seconds in zip(values, row, strict=True):
            own = with_value(compressor, layer.settings, setting, value)
            assert (seconds > 0) == (own.level(layer.shape, own.settings()) is not None)
