"""RankScheduler where something fails: all workers raise, and nothing has changed."""

import functools
from typing import Any

import pytest
import torch

from efsgd import CollectiveError, WorkerMismatchError
from efsgd.rank import LGreCo
from tests.rank.rank_policies import Odd
from tests.rank.rank_runs import (
    SHAPES,
    SQUARE,
    Team,
    accordion,
    all_of,
    nothing_changes,
    ready,
    run_windows,
    step_once,
)


@pytest.mark.parametrize("worker", [0, 1, 2])
def test_what_a_policy_raises_on_one_worker_is_an_error_on_all(worker: int) -> None:
    team = ready(lambda: Odd(worker, RuntimeError("a policy's own words")), 3)
    expected = RuntimeError if worker == 0 else CollectiveError
    with nothing_changes(team), pytest.raises(expected) as caught:
        team.decide()
    told = f"worker {worker} could not decide, and says itself why."
    words = [str(caught.value), *caught.value.__notes__]
    assert sum("a policy's own words" in text for text in words) == 1
    assert sum(told in text for text in words) == 2


@pytest.mark.parametrize("proposal", [7, 2.5, float("nan"), 0])
def test_a_proposal_that_is_none_of_the_policy_s_values_is_refused_by_all(proposal: Any) -> None:
    team, words = ready(lambda: Odd(0, proposal)), r"must be one of its values, which are \[1, 4\]"
    with nothing_changes(team), pytest.raises(ValueError, match=words) as caught:
        team.decide()
    assert f"Invalid rank of parameter 0: {float(proposal)}" in str(caught.value)
    assert caught.value.__notes__ == [f"worker 1: ValueError: {caught.value}"]


def test_a_proposal_that_is_no_number_is_an_error_on_all() -> None:
    team = ready(lambda: Odd(1, "high"))
    with nothing_changes(team), pytest.raises(CollectiveError, match="worker 1"):
        team.decide()


@pytest.mark.parametrize(
    "options",
    [{}, {"sketch": None}, {"gradients": "worker 0"}, {"scope": "model"}],
    ids=["sketch", "whole", "worker 0", "model"],
)
def test_a_collective_that_fails_changes_nothing_and_the_next_try_decides_the_same(
    options: dict[str, Any],
) -> None:
    dtypes = [torch.float64, torch.float32]
    teams = [Team(lambda: accordion(**options), 2, SHAPES, dtype=dtype) for dtype in dtypes]
    twins = [Team(lambda: accordion(**options), 2, SHAPES, dtype=dtype) for dtype in dtypes]
    for team, twin in zip(teams, twins, strict=True):
        for each in (team, twin):
            run_windows(each, 0, 2)
            step_once(each)
        count = len(twin.decide())
        assert count == 3  # the comparison, norms, and the decision
        before = all_of(team)
        for position in range(count):
            with nothing_changes(team), pytest.raises(CollectiveError, match="injected"):
                team.decide(fail_at=position)
        team.decide()
        assert all_of(team) == all_of(twin)
        assert all_of(team) != before


def test_workers_with_different_values_do_not_decide() -> None:
    team = Team(accordion, 3, SHAPES)
    run_windows(team, 0, 1)
    step_once(team)
    team.optimizers[1].param_groups[1]["per_parameter"] = {"rank": (2,)}
    with nothing_changes(team), pytest.raises(WorkerMismatchError) as caught:
        team.decide()
    text = str(caught.value)
    assert "workers 0, 2: rank of parameter 1: 3; worker 1: rank of parameter 1: 2" in text
    assert len(caught.value.__notes__) == 2
    team.optimizers[1].param_groups[1]["per_parameter"] = {"rank": (3,)}
    team.decide()


def test_a_worker_that_cannot_even_say_what_it_has_is_an_error_on_all() -> None:
    team = ready()
    team.optimizers[1].param_groups[0]["min_compression_rate"] = -1
    with pytest.raises(WorkerMismatchError, match="worker 1: cannot decide: ValueError") as caught:
        team.decide()
    assert "worker 1: ValueError: Invalid min_compression_rate: -1" in caught.value.__notes__[0]


def test_workers_in_different_windows_or_with_other_parameters_do_not_decide() -> None:
    team = Team(accordion, 2, SHAPES)
    early = team.schedulers[1].state_dict()
    run_windows(team, 0, 1)
    step_once(team)
    now = team.schedulers[1].state_dict()
    team.schedulers[1].load_state_dict(early)
    with pytest.raises(WorkerMismatchError, match="window 1 of ranks; worker 1: window 0 of ranks"):
        team.decide()
    team.schedulers[1].load_state_dict(now)
    more = torch.zeros(SQUARE, dtype=torch.float64, requires_grad=True)
    team.optimizers[1].add_param_group({"params": [more]})
    with pytest.raises(WorkerMismatchError, match="worker 1: rank of parameter 4"):
        team.decide()


def no_costs(scale: int, *_: object) -> Any:
    """For `functools.partial`, which shows itself with an address."""
    yield from ()


@pytest.mark.parametrize(
    "change",
    [
        {"reference": 3},
        {"values": (2, 4)},
        {"tolerance": 2.0},
        {"observations": 9},
        {"interval": 2},
        {"spectrum": "svd"},
        {"iterations": 1},
        {"gradients": "worker 0"},
        {"sketch": 64},
        {"costs": None},
    ],
    ids=str,
)
def test_policies_read_alike_where_they_are_alike_and_nowhere_else(change: dict[str, Any]) -> None:
    def policy(**own: Any) -> LGreCo:
        costs = functools.partial(no_costs, 1)
        return LGreCo(**{"reference": 4, "values": (2, 3, 4), "costs": costs, **own})

    made = [policy(), policy(), policy(**change)]
    assert repr(made[0]) == repr(made[1]) != repr(made[2])
    assert " at 0x" not in repr(made[0])


def test_workers_with_other_policies_do_not_decide() -> None:
    for other in (accordion(interval=2), accordion(sketch=64), LGreCo(3)):
        policies = [accordion(), other]
        team = ready(policies.pop)
        with (
            nothing_changes(team),
            pytest.raises(WorkerMismatchError, match="decisions by Accordion"),
        ):
            team.decide()


@pytest.mark.parametrize(
    ("proposal", "words"),
    [(lambda *_: {}, "Must be a generator"), (None, "Must be a dict from the indices of layers")],
)
def test_a_policy_of_ones_own_is_told_what_it_lacks(proposal: Any, words: str) -> None:
    team = ready()

    def nothing(*_: object) -> Any:
        yield from ()

    for scheduler in team.schedulers:
        scheduler.policy.__dict__["propose"] = nothing if proposal is None else proposal
    with pytest.raises(TypeError, match=words):
        team.decide()
