"""A share of a step's time is kept, by made-up clocks on a made-up network."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from efsgd import PowerSGD, TopK
from efsgd.errors import CollectiveError
from efsgd.rank import CommunicationBudget
from efsgd.rank.costs.network import Network
from tests.rank.made_time import MadeWorkers, optimizers
from tests.strategies import Shape

SHAPES: list[Shape] = [(24, 16), (16,), (12, 3, 3, 2), (24, 16), (40, 30)]
LATENCY, PER_BYTE = 0.001, 1e-5
OWN_RANK = 3


def made(
    share: float,
    world_size: int = 2,
    compressor: Any = None,
    computation: Sequence[float] = (1.0,),
    latency: float = LATENCY,
    per_byte: float = PER_BYTE,
    shapes: Sequence[Shape] = SHAPES,
    **options: Any,
) -> MadeWorkers:
    compressor = PowerSGD(rank=OWN_RANK) if compressor is None else compressor
    return MadeWorkers(
        optimizers(shapes, world_size, compressor),
        lambda clock: CommunicationBudget(share_of_step=share, clock=clock, **options),
        latency,
        per_byte,
        computation,
    )


def cost(rank: int, world_size: int = 2) -> float:
    """The seconds that the made-up network takes for the two collectives of a step."""
    (nbytes,) = MadeWorkers(optimizers(SHAPES, world_size, PowerSGD(rank=rank))).train(1)
    # The smaller buffer that is timed has four bytes, which count as latency.
    return 2 * (LATENCY + 4 * PER_BYTE) + PER_BYTE * nbytes


def share(seconds: float, computation: float) -> float:
    return seconds / (seconds + computation)


@pytest.mark.parametrize("wanted", [0.05, 0.1, 0.3])
def test_communication_takes_the_share_and_would_take_more_with_the_next_rank(
    wanted: float,
) -> None:
    computation = 0.2
    workers = made(wanted, computation=[computation])
    workers.window(5)
    chosen = workers.optimizers[0].param_groups[0]["per_parameter"]["rank"]
    uniform = min(rank for rank in chosen if rank is not None)
    assert 1 <= uniform < 30
    assert share(cost(uniform), computation) <= wanted < share(cost(uniform + 1), computation)
    workers.train(1)  # the first one with these ranks compares workers
    began = workers.clocks[0].now
    workers.train(1)
    seconds = workers.clocks[0].now - began - computation
    assert share(cost(uniform) - 8 * PER_BYTE, computation) <= share(seconds, computation) <= wanted
    assert workers.ranks()[0] == workers.ranks()[1]


def policies(workers: MadeWorkers) -> list[CommunicationBudget]:
    found = [scheduler.policy for scheduler in workers.schedulers]
    return [policy for policy in found if isinstance(policy, CommunicationBudget)]


def settings_now(workers: MadeWorkers) -> list[Any]:
    return [o.param_groups[0]["per_parameter"] for o in workers.optimizers]


def test_what_was_measured_is_the_same_on_all_workers_and_what_was_made_up() -> None:
    workers = made(0.3, computation=[0.1, 0.5])
    assert [policy.network for policy in policies(workers)] == [None, None]
    workers.window(4)
    one, other = policies(workers)
    assert one.network == other.network and one.step_seconds == other.step_seconds
    assert isinstance(one.network, Network)
    # Differences of times near 100 have errors near 1e-14.
    assert one.network.latency == pytest.approx(LATENCY + 4 * PER_BYTE, rel=1e-9)
    assert one.network.seconds_per_byte == pytest.approx(PER_BYTE, rel=1e-9)
    expected = 0.3 + cost(OWN_RANK) - 8 * PER_BYTE
    assert one.step_seconds == pytest.approx(expected, rel=1e-9)


def test_the_optimizers_own_values_stay_until_a_step_was_timed() -> None:
    workers = made(0.3, computation=[0.01])
    assert settings_now(workers) == [None, None]
    workers.window(1)  # one step in a window has nothing to be timed from
    assert workers.ranks() == [[OWN_RANK] * 4] * 2
    assert [policy.network for policy in policies(workers)] == [None, None]


def test_the_median_of_a_window_counts_and_not_the_time_between_windows() -> None:
    workers = made(0.3, interval=1)
    # In the first window one step waits for data; the second one has two steps.
    for computation, steps in ((0.2, [0.2, 0.2, 0.2, 9.0, 0.2]), (0.05, [0.05, 0.05])):
        for clock in workers.clocks:
            clock.now += 50.0  # an evaluation between epochs
        for own in steps:
            workers.computation = [own]
            workers.train(1)
        sent = workers.optimizers[0].communication_stats()["bytes_sent"]
        workers.decide()
        seconds = policies(workers)[0].step_seconds
        # Differences of times near 100 have errors near 1e-14.
        assert seconds == pytest.approx(computation + 2 * LATENCY + PER_BYTE * sent, rel=1e-9)


def test_windows_between_two_measurements_decide_nothing() -> None:
    workers = made(0.3, interval=3, computation=[0.05])
    found = []
    for _ in range(7):
        workers.train(3)
        found.append(len(workers.decide().trace) > 2)  # a comparison, and the decision
    assert found == [True, False, False, True, False, False, True]


def test_a_measurement_sends_what_the_documentation_says() -> None:
    workers = made(0.3)
    workers.train(3)
    sent = [traced.nbytes for traced in workers.decide().trace]
    own, first, last = [4] * 6 + [2**20] * 6 + [16, 8], 24, 8 * (1 + 4)
    assert sent == [first, *own, last]  # the first and the last: every decision


def test_where_even_the_smallest_is_too_much_it_is_taken_and_said_once() -> None:
    workers = made(0.001, world_size=2, interval=1)
    workers.train(3)
    with pytest.warns(UserWarning) as caught:
        workers.decide()
    text = "more than share_of_step=0.001. That is the smallest value there is, and is taken."
    assert len(caught) == 2  # a warning of each worker
    assert all(text in str(warning.message) for warning in caught)
    assert all(own["rank"] == (1, None, 1, 1, 1) for own in settings_now(workers))
    workers.train(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        workers.decide()


def test_one_worker_sends_nothing_and_takes_the_largest() -> None:
    workers = made(0.01, world_size=1, max_rank=7)
    workers.window(3)
    assert settings_now(workers)[0]["rank"] == (7, None, 7, 7, 7)


def test_payloads_that_are_gathered_take_longer_the_more_workers_there_are() -> None:
    values, shapes = [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4], [(60, 50), (30, 40)]
    found = []
    for world_size in (2, 8):
        options: dict[str, Any] = {"values": values, "setting": "density", "shapes": shapes}
        workers = made(0.2, world_size, TopK(density=0.1), [0.3], **options)
        workers.window(3)

        def seconds(density: float, count: int = world_size) -> float:
            payload = sum(8 * int(density * numel) for numel in (3000, 1200))
            words = 4 * (2 + count)
            return 2 * (LATENCY + 4 * PER_BYTE) + PER_BYTE * (words + payload * count / 2)

        step_seconds = policies(workers)[0].step_seconds
        assert step_seconds is not None
        limit = 0.2 / 0.8 * (step_seconds - seconds(0.1))
        found.append(min(settings_now(workers)[0]["density"]))
        assert found[-1] == max(value for value in values if seconds(value) <= limit)
    assert found[1] < found[0]


def test_a_collective_that_fails_changes_nothing_and_the_next_call_decides() -> None:
    twin = made(0.3, computation=[0.05])
    twin.train(3)
    length = len(twin.decide().trace)
    for fail_at in (0, length // 2, length - 2, length - 1):
        workers = made(0.3, computation=[0.05])
        workers.train(3)
        with pytest.raises(CollectiveError):
            workers.decide(fail_at)
        assert settings_now(workers) == [None, None]
        assert [policy.network for policy in policies(workers)] == [None, None]
        assert workers.schedulers[0].state_dict()["policy"] == {"windows": 0}
        workers.decide()
        assert settings_now(workers) == settings_now(twin)


def test_the_default_device_makes_no_difference() -> None:
    found = []
    for device in ("cpu", "meta"):
        workers = made(0.3, computation=[0.05])
        workers.train(3)
        torch.set_default_device(device)
        try:
            workers.decide()
        finally:
            torch.set_default_device(None)
        found.append(settings_now(workers))
    assert found[0] == found[1]
