"""The network is measured by all-reduces whose time is known, and all workers get the same."""

import statistics
from typing import Any

import torch

from efsgd.rank.costs.network import LARGE_BYTES, Network, measure_network
from efsgd.testing import lockstep
from efsgd.wire.collectives import Collective, Exchange, intercept
from tests.rank.made_time import MadeClock

CPU = torch.device("cpu")


def measured(workers: int, seconds: Any, **options: Any) -> Any:
    """`seconds(worker, number, nbytes)` is what the collective with this number takes."""

    def slowed(worker: int) -> Exchange[Network]:
        clock, number = MadeClock(7.0 * worker), 0

        def outgoing(collective: Collective) -> None:
            nonlocal number
            nbytes = collective.buffer.numel() * collective.buffer.element_size()
            clock.now += seconds(worker, number, nbytes)
            number += 1

        return intercept(measure_network(CPU, workers, clock=clock, **options), outgoing)

    return lockstep([slowed(worker) for worker in range(workers)])


def test_latency_and_time_of_a_byte_are_found() -> None:
    found = measured(3, lambda worker, number, nbytes: 0.25 + 2.0**-20 * (nbytes - 4))
    # Sums of few powers of two are exact.
    assert found.results == [Network(0.25, 2.0**-20)] * 3
    assert {traced.nbytes for traced in found.trace[:-1]} == {4, LARGE_BYTES}
    assert len(found.trace) == 2 * (5 + 1) + 1


def test_medians_without_the_first_count_and_the_mean_of_the_workers() -> None:
    noise = [900.0, 3.0, 1.0, 2.0]  # of each size, the first one waits for the others

    def seconds(worker: int, number: int, nbytes: int) -> float:
        return (1 + worker) * noise[number % 4] + (10.0 * worker if nbytes > 4 else 0.0)

    small = statistics.mean([2.0, 4.0])
    found = measured(2, seconds, repeats=3)
    assert found.results == [Network(small, 5.0 / (LARGE_BYTES - 4))] * 2


def test_a_larger_buffer_that_was_faster_costs_nothing_more() -> None:
    found = measured(2, lambda worker, number, nbytes: 1.0 if nbytes == 4 else 0.5)
    assert found.results == [Network(1.0, 0.0)] * 2


def test_one_worker_sends_nothing() -> None:
    found = measured(1, lambda *_: 1.0)
    assert found.results == [Network(0.0, 0.0)] and found.trace == []


def test_the_model_is_a_latency_for_each_collective_and_a_time_for_each_byte() -> None:
    network = Network(latency=0.5, seconds_per_byte=0.125)
    assert network.seconds(16) == 3.0
    assert network.seconds(16, collectives=1) == 2.5
    assert network.seconds(0, collectives=0) == 0.0
