"""RankScheduler: all workers decide alike, or not at all; and watching changes nothing."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efsgd import CollectiveError, PowerSGDOptimizer, WorkerMismatchError
from efsgd.rank import Accordion, RankScheduler
from efsgd.testing import lockstep
from tests import rank_worker
from tests.launcher import launch
from tests.rank_policies import Drawn, Odd, Still
from tests.rank_runs import SQUARE, Team, individual, of_norm
from tests.simulation import a_run, bits, snapshot, step_with
from tests.strategies import gaussian

SHAPES = [SQUARE, (24, 12), (10,), (8, 3, 3, 3)]


def accordion(**options: Any) -> Accordion:
    return Accordion(**{"low": 1, "high": 3, "interval": 1, **options})


def all_of(team: Team) -> Any:
    """All that a decision may change, as bits."""
    saved = [scheduler.state_dict() for scheduler in team.schedulers]
    return bits([snapshot(team.optimizers), saved])


def run_windows(team: Team, first: int, last: int, seed: int = 0) -> list[Any]:
    """Windows of two steps with gradients that grow, differ between workers, and now and then
    change by much; what is decided after each."""
    decided = []
    for window in range(first, last):
        scale = 10.0 if window % 3 == 2 else 1.0 + 0.05 * window
        for step in range(2):
            team.step(
                [
                    [scale * gaussian(s, seed, window, step, w, i) for i, s in enumerate(SHAPES)]
                    for w in range(len(team.optimizers))
                ]
            )
        team.decide()
        decided.append(team.ranks)
    return decided


@settings(max_examples=12)
@given(
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from([None, 16, 4096]),
    st.sampled_from(["layer", "model"]),
    st.sampled_from(["mean", "worker 0"]),
    st.integers(0, 99),
)
def test_all_workers_decide_alike(
    world_size: int, sketch: int | None, scope: str, gradients: str, seed: int
) -> None:
    options = {"sketch": sketch, "scope": scope, "gradients": gradients, "threshold": 0.2}
    team = Team(lambda: accordion(**options), world_size, SHAPES)
    for window in range(4):
        run_windows(team, window, window + 1, seed)
        assert len({str(individual(optimizer)) for optimizer in team.optimizers}) == 1
        policies = [scheduler.policy.state_dict() for scheduler in team.schedulers]
        assert all(policy == policies[0] for policy in policies)
    assert team.ranks[2] is None
    assert set(team.ranks) <= {None, 1, 3}


def test_where_workers_propose_different_values_all_take_those_of_worker_0() -> None:
    team = Team(Drawn, 3, SHAPES)
    for window in range(4):
        layers = team.schedulers[0]._layers()
        wanted = [s.policy.draw(layers, w) for w, s in enumerate(team.schedulers)]
        assert len({str(each) for each in wanted}) > 1
        run_windows(team, window, window + 1)
        for optimizer in team.optimizers:
            ranks = dict(enumerate(individual(optimizer)))
            assert {index: rank for index, rank in ranks.items() if rank is not None} == wanted[0]


@pytest.mark.parametrize("worker", [0, 1, 2])
def test_what_a_policy_raises_on_one_worker_is_an_error_on_all(worker: int) -> None:
    team = Team(lambda: Odd(worker, RuntimeError("a policy's own words")), 3, SHAPES)
    team.step_alike(*[4.0] * len(SHAPES))
    before = all_of(team)
    expected = RuntimeError if worker == 0 else CollectiveError
    with pytest.raises(expected) as caught:
        team.decide()
    told = f"could not decide, and say themselves why: worker {worker}."
    words = [str(caught.value), *caught.value.__notes__]
    assert sum("a policy's own words" in text for text in words) == 1
    assert sum(told in text for text in words) == 2
    assert all_of(team) == before


@pytest.mark.parametrize("proposal", [7, 2.5, float("nan"), 0])
def test_a_proposal_that_is_none_of_the_policy_s_values_is_refused_by_all(proposal: Any) -> None:
    team = Team(lambda: Odd(0, proposal), 2, SHAPES)
    team.step_alike(*[4.0] * len(SHAPES))
    before = all_of(team)
    with pytest.raises(
        ValueError, match=r"must be one of its values, which are \[1, 4\]"
    ) as caught:
        team.decide()
    assert f"Invalid rank of parameter 0: {float(proposal)}" in str(caught.value)
    assert caught.value.__notes__ == [f"worker 1: ValueError: {caught.value}"]
    assert all_of(team) == before


def test_a_proposal_that_is_no_number_is_an_error_on_all() -> None:
    team = Team(lambda: Odd(1, "high"), 2, SHAPES)
    team.step_alike(*[4.0] * len(SHAPES))
    before = all_of(team)
    with pytest.raises(CollectiveError, match="worker 1"):
        team.decide()
    assert all_of(team) == before


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
            each.step_alike(*[4.0] * len(SHAPES))
        count = len(twin.decide())
        assert count == 3  # the comparison, norms, and the decision
        before = all_of(team)
        for position in range(count):
            with pytest.raises(CollectiveError, match="injected"):
                team.decide(fail_at=position)
            assert all_of(team) == before
        team.decide()
        assert all_of(team) == all_of(twin)
        assert all_of(team) != before


def test_workers_with_different_values_do_not_decide() -> None:
    team = Team(accordion, 3, SHAPES)
    run_windows(team, 0, 1)
    team.step_alike(*[4.0] * len(SHAPES))
    team.optimizers[1].param_groups[1]["per_parameter"] = {"rank": (2,)}
    before = all_of(team)
    with pytest.raises(WorkerMismatchError) as caught:
        team.decide()
    text = str(caught.value)
    assert "workers 0, 2: rank of parameter 1: 3; worker 1: rank of parameter 1: 2" in text
    assert len(caught.value.__notes__) == 2
    assert all_of(team) == before
    team.optimizers[1].param_groups[1]["per_parameter"] = {"rank": (3,)}
    team.decide()


def test_a_worker_that_cannot_even_say_what_it_has_is_an_error_on_all() -> None:
    team = Team(accordion, 2, SHAPES)
    team.step_alike(*[4.0] * len(SHAPES))
    team.optimizers[1].param_groups[0]["min_compression_rate"] = -1
    with pytest.raises(WorkerMismatchError, match="worker 1: cannot decide: ValueError") as caught:
        team.decide()
    assert "worker 1: ValueError: Invalid min_compression_rate: -1" in caught.value.__notes__[0]


def test_workers_in_different_windows_or_with_other_parameters_do_not_decide() -> None:
    team = Team(accordion, 2, SHAPES)
    early = team.schedulers[1].state_dict()
    run_windows(team, 0, 1)
    team.step_alike(*[4.0] * len(SHAPES))
    now = team.schedulers[1].state_dict()
    team.schedulers[1].load_state_dict(early)
    with pytest.raises(WorkerMismatchError, match="window 1 of ranks; worker 1: window 0 of ranks"):
        team.decide()
    team.schedulers[1].load_state_dict(now)
    more = torch.zeros(SQUARE, dtype=torch.float64, requires_grad=True)
    team.optimizers[1].add_param_group({"params": [more]})
    with pytest.raises(WorkerMismatchError, match="worker 1: rank of parameter 4"):
        team.decide()


def test_ranks_are_named_and_no_larger_than_the_matrix() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 3), torch.nn.Linear(3, 40))
    optimizer = PowerSGDOptimizer(model.named_parameters(), lr=0.1, min_compression_rate=0.0)
    scheduler = RankScheduler(optimizer, accordion(high=8))
    assert scheduler.get_last_ranks() == {
        "parameter 0 (0.weight)": 3,
        "parameter 2 (1.weight)": 3,
    }
    assert individual(optimizer) == [8, None, 8, None]


def test_a_window_without_a_step_decides_nothing() -> None:
    team = Team(accordion, 2, SHAPES)
    assert team.decide() == []
    run_windows(team, 0, 2)
    before = all_of(team)
    team.set_lr(*[0.5] * len(SHAPES))
    lrs = all_of(team)
    assert team.decide() == []
    assert all_of(team) == lrs != before


def test_a_scheduler_that_is_closed_neither_watches_nor_decides() -> None:
    team = Team(accordion, 2, SHAPES)
    run_windows(team, 0, 2)
    for scheduler in team.schedulers:
        scheduler.close()
        scheduler.close()
    before = [scheduler.state_dict() for scheduler in team.schedulers]
    team.step_alike(*[4.0] * len(SHAPES))
    assert team.decide() == []
    assert bits([scheduler.state_dict() for scheduler in team.schedulers]) == bits(before)
    assert team.optimizers[0]._stepper.watchers == []


def test_two_schedulers_decide_on_two_settings() -> None:
    parameters = [torch.zeros(SQUARE, requires_grad=True) for _ in range(2)]
    optimizer = PowerSGDOptimizer(parameters, lr=0.1)
    ranks = RankScheduler(optimizer, accordion())
    rates = RankScheduler(
        optimizer, Accordion(0.5, 1.5, interval=2, setting="min_compression_rate")
    )
    decided = []
    for norms in ((4, 4), (4, 1), (4, 1)):
        for parameter, norm in zip(parameters, norms, strict=True):
            parameter.grad = of_norm(norm).float()
        optimizer.step()
        for scheduler in (ranks, rates):
            scheduler.step()
        decided.append(dict(optimizer.param_groups[0]["per_parameter"]))
    assert decided == [
        {"rank": (3, 3), "min_compression_rate": (1.5, 1.5)},
        {"rank": (1, 3), "min_compression_rate": (1.5, 1.5)},
        {"rank": (1, 1), "min_compression_rate": (0.5, 1.5)},
    ]


def test_a_policy_begins_anew_with_a_second_scheduler() -> None:
    policy = accordion()
    for _ in range(2):
        parameter = torch.zeros(SQUARE, requires_grad=True)
        optimizer = PowerSGDOptimizer([parameter], lr=0.1)
        scheduler = RankScheduler(optimizer, policy)
        decided = []
        for _ in range(2):
            parameter.grad = torch.ones(SQUARE)
            optimizer.step()
            scheduler.step()
            decided += individual(optimizer)
        assert decided == [3, 1]


@pytest.mark.parametrize("sketch", [64, 4096, None])
def test_bytes_of_decisions_are_those_of_their_buffers(sketch: int | None) -> None:
    many, alone = (Team(lambda: accordion(sketch=sketch), count, SHAPES) for count in (2, 1))
    sent, of_steps = 0, 0
    for window in range(3):
        for team in (many, alone):
            team.step_alike(*[4.0 + window] * len(SHAPES))
        of_steps += alone.optimizers[0].communication_stats()["bytes_sent"]
        alone.schedulers[0].step()
        sent += sum(traced.nbytes for traced in many.decide())
    stats = alone.optimizers[0].communication_stats()
    assert stats["decision_bytes_sent"] == sent > 0
    assert stats["total_bytes_sent"] == of_steps + sent
    assert stats["check_bytes_sent"] == 0


@pytest.mark.parametrize("world_size", [1, 3])
def test_watching_changes_nothing(world_size: int) -> None:
    watched, scenario = a_run(world_size)
    plain, _ = a_run(world_size)
    schedulers = [RankScheduler(optimizer, Still()) for optimizer in watched]
    for step in range(6):
        for workers in (watched, plain):
            step_with(workers, scenario.gradients(step))
        if step % 2 == 1:
            exchanges = [s.exchange(world_size, w) for w, s in enumerate(schedulers)]
            lockstep(exchanges)
    for each in watched:
        assert individual(each) == [2, None, 2]
    for own, other in zip(watched, plain, strict=True):
        state, expected = (copy.deepcopy(o.state_dict()) for o in (own, other))
        state["param_groups"][0]["per_parameter"] = None
        assert bits(state) == bits(expected)
        parameters = [o.param_groups[0]["params"] for o in (own, other)]
        assert bits(parameters[0]) == bits(parameters[1])


@pytest.mark.xdist_group("processes")
def test_processes_decide_as_workers_in_lockstep_do(tmp_path: Path) -> None:
    reports = launch(rank_worker.__file__, 2, tmp_path)
    team = Team(rank_worker.policy, 2, rank_worker.SHAPES, dtype=torch.float32)
    decided, sent = [], 0
    for window in range(rank_worker.WINDOWS):
        for step in range(rank_worker.STEPS):
            team.step([rank_worker.gradients(window, step, worker) for worker in range(2)])
        sent += sum(traced.nbytes for traced in team.decide())
        decided.append(team.ranks)
    assert [report["decided"] for report in reports] == [decided, decided]
    assert len({str(ranks) for ranks in decided}) > 1
    sums = team.consolidated()[0]["sums"][0]["sums"]
    for worker, report in enumerate(reports):
        assert report["parameters"] == rank_worker.fingerprint(team.optimizers[worker])
        assert report["decision bytes"] == sent
        assert report["sums"] == rank_worker.checksums(sums)
    assert [report["error"] for report in reports] == ["CollectiveError", "RuntimeError"]
    assert all(report["unchanged"] for report in reports)
