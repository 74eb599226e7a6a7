"""Who has which guarantee, of the steps that may have been seen."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from efsgd import CollectiveError, RandomBlock, RandomK
from efsgd.privacy import PrivateOptimizer, accounting, epsilon
from efsgd.testing import step_together
from tests.privacy.teams import (
    FAMILY,
    SHAPES,
    Make,
    adamw,
    empty_records,
    give,
    made_records,
    power_sgd,
    private_team,
    signum,
    step_with,
    take_step,
    top_k,
    uncompressed,
)
from tests.simulation import copied, parameters_of, through_a_file

SIGMA, RATE, DELTA = 1.3, 0.05, 1e-5


@pytest.fixture(autouse=True)
def _only_rdp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other accountant takes seconds where there are many kinds of steps."""
    monkeypatch.setattr(accounting, "ACCOUNTANTS", ("rdp",))


def random_k(parameters: list[torch.Tensor]) -> Any:
    return uncompressed(parameters, compressor=RandomK(density=0.5))


def random_block(parameters: list[torch.Tensor]) -> Any:
    return uncompressed(parameters, compressor=RandomBlock(density=0.5))


AVERAGE: list[Make] = [power_sgd, adamw, random_k, random_block]


def team_of(world_size: int, make: Make = uncompressed, **settings: Any) -> list[PrivateOptimizer]:
    own = {"noise_multiplier": SIGMA, "sample_rate": RATE, **settings}
    return private_team(world_size, make, **own)


def steps(team: Sequence[PrivateOptimizer], number: int) -> None:
    for _ in range(number):
        step_with(team, empty_records(team))


def rdp(multiple: float, number: int, rate: float = RATE) -> float:
    return epsilon(SIGMA * multiple, rate, number, DELTA, accountant="rdp")


def found(optimizer: PrivateOptimizer) -> dict[str, float]:
    return {who: each["rdp"] for who, each in optimizer.guarantees(DELTA).items()}


def approximately(expected: dict[str, float]) -> Any:
    return pytest.approx(expected, rel=1e-9)  # square roots of numbers of workers


@pytest.mark.parametrize(
    ("make", "world_size"),
    [*((uncompressed, w) for w in (1, 2, 4)), *((m, 3) for m in AVERAGE)],
)
def test_observers_of_compressors_that_average(make: Make, world_size: int) -> None:
    for observer, share in (("messages", 1.0), ("sum", world_size**-0.5)):
        team = team_of(world_size, make, observer=observer)
        steps(team, 2)
        expected = {"messages": rdp(share, 2), "sum": rdp(share * world_size**0.5, 2)}
        if world_size > 1:
            expected["sum_to_worker"] = rdp(share * (world_size - 1) ** 0.5, 2)
        assert found(team[-1]) == approximately(expected)


@pytest.mark.parametrize("make", [top_k, signum])
def test_compressors_that_gather_never_claim_the_sum(make: Make) -> None:
    team = team_of(3, make)
    assert set(team[0].guarantees(DELTA)) == {"messages"}
    steps(team, 1)
    assert found(team[0]) == approximately({"messages": rdp(1.0, 1)})


def test_both_accountants_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "ACCOUNTANTS", ("prv", "rdp"))
    team = team_of(2)
    assert team[0].guarantees(DELTA)["messages"] == {"prv": 0.0, "rdp": 0.0}
    steps(team, 3)
    for multiple, who in ((1.0, "messages"), (2**0.5, "sum"), (1.0, "sum_to_worker")):
        expected = {"prv": epsilon(SIGMA * multiple, RATE, 3, DELTA), "rdp": rdp(multiple, 3)}
        assert team[0].guarantees(DELTA)[who] == approximately(expected)


def test_without_noise_nothing_is_guaranteed() -> None:
    team = team_of(2, noise_multiplier=0.0)
    steps(team, 1)
    assert set(found(team[0]).values()) == {math.inf}


def test_without_a_sample_rate_every_record_counts_in_every_step() -> None:
    team = team_of(1, sample_rate=None)
    steps(team, 2)
    assert found(team[0])["messages"] == rdp(1.0, 2, rate=1.0)


@pytest.mark.parametrize("delta", [0, 1, -1.0, math.nan, "1e-5", None, True])
def test_deltas_out_of_range(delta: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"Invalid delta: .*number of records"):
        team_of(1)[0].guarantees(delta)


def test_settings_that_change_count_as_they_were() -> None:
    """By schedulers of noise, of batches, or of rates."""
    team = team_of(1)
    steps(team, 2)
    team[0].noise_multiplier, team[0].sample_rate = 2 * SIGMA, RATE / 2
    steps(team, 1)
    team[0].noise_multiplier = 0.25 * SIGMA
    steps(team, 1)
    releases = team[0].state_dict()["privacy"]["releases"]
    assert [(each[0] / SIGMA, each[2], each[-1]) for each in releases] == [
        (1.0, RATE, 2), (2.0, RATE / 2, 1), (0.25, RATE / 2, 1),
    ]  # fmt: skip
    assert found(team[0])["messages"] > rdp(0.25, 1, RATE / 2)


def test_numbers_of_workers_that_change() -> None:
    """Worker 0 goes on alone, and with another one."""
    team = team_of(3)
    steps(team, 2)
    steps(team[:2], 1)
    assert set(found(team[0])) == {"messages", "sum", "sum_to_worker"}
    assert found(team[0])["messages"] == approximately(rdp(1.0, 3))
    assert rdp(3**0.5, 3) < found(team[0])["sum"] < rdp(2**0.5, 3)
    steps(team[:1], 1)
    assert set(found(team[0])) == {"messages", "sum"}
    assert found(team[0])["messages"] == approximately(rdp(1.0, 4))


# ---- what may have been seen --------------------------------------------------------------------


def test_steps_that_failed_count() -> None:
    team = team_of(2, power_sgd)
    steps(team, 1)
    give(team, made_records(SHAPES, [3, 3]))
    with pytest.raises(CollectiveError, match="injected"):
        step_together(team, fail_at=1)
    assert found(team[0])["messages"] == rdp(1.0, 2)
    # A worker that sends nothing of its own has released nothing, but the others have.
    give(team, made_records(SHAPES, [3, 3]))
    team[1].max_grad_norm = -1.0
    with pytest.raises(CollectiveError, match="worker 1"):
        step_together(team)
    assert [found(optimizer)["messages"] for optimizer in team] == [rdp(1.0, 3), rdp(1.0, 2)]


def test_skipped_steps_send_nothing_and_count_nothing() -> None:
    team = team_of(1)
    team[0].signal_skip_step()
    give(team, made_records(SHAPES, [3]))
    team[0].step()
    assert found(team[0])["messages"] == 0.0
    step_with(team, made_records(SHAPES, [3]))
    assert found(team[0])["messages"] == rdp(1.0, 1)


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_checkpoints_keep_what_was_released(make: Make) -> None:
    team = team_of(2, make)
    steps(team, 3)
    resumed = team_of(2, make)
    for optimizer, own in zip(resumed, team, strict=True):
        optimizer.load_state_dict(through_a_file(own.state_dict()))
    assert found(resumed[0]) == found(team[0])
    steps(resumed, 2)
    assert found(resumed[0])["messages"] == rdp(1.0, 5)


def test_loading_forgets_nothing() -> None:
    team = team_of(1)
    steps(team, 2)
    early = through_a_file(team[0].state_dict())
    steps(team, 2)
    team[0].load_state_dict(early)  # it goes back: four steps have been seen
    assert found(team[0])["messages"] == rdp(1.0, 4)
    steps(team, 1)
    team[0].load_state_dict(early)
    assert found(team[0])["messages"] == rdp(1.0, 5)
    # That of another run comes on top.
    other = team_of(1, sample_rate=2 * RATE)
    steps(other, 1)
    other[0].load_state_dict(early)
    releases = other[0].state_dict()["privacy"]["releases"]
    assert [(each[2], each[-1]) for each in releases] == [(RATE, 2), (2 * RATE, 1)]
    # That of an optimizer without privacy, whose errors are empty, brings nothing.
    plain = uncompressed(copied(parameters_of(other[0])))[0]
    other[0].load_state_dict(plain.state_dict())
    assert other[0].state_dict()["privacy"]["releases"] == releases


def test_steps_of_another_training_count_though_they_are_like_its_own() -> None:
    """They were seen as well; the same ones are counted once, however often they are loaded."""
    first, second = team_of(1), team_of(1)
    steps(first, 5)
    early = through_a_file(first[0].state_dict())
    steps(first, 3)
    steps(second, 10)
    for saved, number in ((early, 15), (first[0].state_dict(), 18), (early, 18)):
        second[0].load_state_dict(saved)
        assert found(second[0])["messages"] == approximately(rdp(1.0, number))
    # Two runs that go on from the same checkpoint: what they took by themselves adds up.
    runs = [team_of(1) for _ in range(2)]
    for run in runs:
        run[0].load_state_dict(early)
        steps(run, 2)
    runs[0][0].load_state_dict(through_a_file(runs[1][0].state_dict()))
    assert found(runs[0][0])["messages"] == approximately(rdp(1.0, 5 + 2 + 2))


def test_a_checkpoint_of_another_worker_is_of_the_same_steps() -> None:
    """Workers that train together agree on whose steps these are."""
    team = team_of(3)
    steps(team, 3)
    saved = [through_a_file(optimizer.state_dict()) for optimizer in team]
    steps(team, 1)
    for own in saved:
        for optimizer in team:
            optimizer.load_state_dict(own)
            assert found(optimizer)["messages"] == approximately(rdp(1.0, 4))
    steps(team[:2], 1)  # without one of them, from where they are
    assert found(team[0])["messages"] == approximately(rdp(1.0, 5))


@pytest.mark.parametrize("make", [uncompressed, adamw])
def test_what_the_wrapped_optimizer_or_its_averager_load_counts(make: Make) -> None:
    team, others = team_of(2, make), team_of(2, make)
    steps(team, 3)
    for optimizer, own in zip(others, team, strict=True):
        sender, saved = optimizer.averager or optimizer.original_optimizer, own.averager or own
        sender.load_state_dict(through_a_file(saved.state_dict()))
        optimizer.original_optimizer.load_state_dict(through_a_file(own.state_dict()))
        assert found(optimizer) == found(own)


def test_a_checkpoint_that_cannot_be_loaded_counts_nothing() -> None:
    team, other = team_of(1), team_of(1, lambda p: uncompressed(p[:1]))
    steps(other, 3)
    with pytest.raises(ValueError):
        team[0].load_state_dict(other[0].state_dict())
    assert found(team[0])["messages"] == 0.0
    team[0].load_state_dict(team[0].state_dict())
    assert found(team[0])["messages"] == 0.0


def test_a_worker_without_a_step_has_released_nothing() -> None:
    team = team_of(1)
    assert set(found(team[0]).values()) == {0.0}
    give(team, made_records(SHAPES, [2]))
    assert take_step(team)[0]
    assert found(team[0])["sum"] > 0
