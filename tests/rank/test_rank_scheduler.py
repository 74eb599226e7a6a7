"""RankScheduler: all workers decide alike, and watching changes nothing."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efsgd import PowerSGDOptimizer
from efsgd.rank import Accordion, RankScheduler
from efsgd.testing import Traced, lockstep
from tests.launcher import launch
from tests.rank import rank_worker
from tests.rank.rank_policies import Drawn, Still
from tests.rank.rank_runs import (
    SHAPES,
    SQUARE,
    Team,
    accordion,
    all_of,
    individual,
    of_norm,
    run_windows,
    step_once,
)
from tests.simulation import a_run, bits, step_with


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


def test_ranks_are_named_and_no_larger_than_the_matrix() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(40, 3), torch.nn.Linear(3, 40))
    optimizer = PowerSGDOptimizer(model.named_parameters(), lr=0.1, min_compression_rate=0.0)
    scheduler = RankScheduler(optimizer, accordion(high=8))
    assert scheduler.get_last_ranks() == {
        "parameter 0 (0.weight)": 3,
        "parameter 2 (1.weight)": 3,
    }
    assert individual(optimizer) == [8, None, 8, None]


COMPARISON = "digests of settings, parameters and state"


def purposes(trace: Sequence[Traced]) -> list[str]:
    return [traced.purpose for traced in trace]


def test_a_change_that_was_decided_need_not_be_announced() -> None:
    team = Team(accordion, 2, SHAPES)
    changed = []
    for _ in range(3):
        ordinary = len(step_once(team))
        before = team.schedulers[0].get_last_ranks()
        team.decide()
        if team.schedulers[0].get_last_ranks() != before:
            trace = step_once(team)
            changed.append([purposes(trace).count(COMPARISON), len(trace) - ordinary])
    # Two comparisons, of settings and of how products are rounded, and no step of zeros.
    assert changed and all(each == [2, 2] for each in changed)


def test_a_policy_and_a_setting_of_an_optimizer_have_one_scheduler() -> None:
    policy, parameter = accordion(), torch.zeros(SQUARE, requires_grad=True)
    optimizer = PowerSGDOptimizer([parameter], lr=0.1)
    scheduler = RankScheduler(optimizer, policy)
    other = PowerSGDOptimizer([torch.zeros(SQUARE, requires_grad=True)], lr=0.1)
    with pytest.raises(ValueError, match=r"Invalid policy: Accordion.* another RankScheduler"):
        RankScheduler(other, policy)
    with pytest.raises(ValueError, match=r"Invalid optimizer: .* decides on its rank already"):
        RankScheduler(optimizer, accordion())
    scheduler.close()
    RankScheduler(optimizer, accordion())
    RankScheduler(other, policy)


def test_a_window_without_a_step_decides_nothing() -> None:
    team = Team(accordion, 2, SHAPES)
    assert purposes(team.decide()) == [COMPARISON]
    run_windows(team, 0, 2)
    before = all_of(team)
    team.set_lr(*[0.5] * len(SHAPES))
    lrs = all_of(team)
    assert purposes(team.decide()) == [COMPARISON]
    assert all_of(team) == lrs != before


def test_a_scheduler_that_is_closed_neither_watches_nor_decides() -> None:
    team = Team(accordion, 2, SHAPES)
    run_windows(team, 0, 2)
    for scheduler in team.schedulers:
        scheduler.close()
        scheduler.close()
    before = [scheduler.state_dict() for scheduler in team.schedulers]
    step_once(team)
    assert purposes(team.decide()) == [COMPARISON]
    assert bits([scheduler.state_dict() for scheduler in team.schedulers]) == bits(before)
    assert team.optimizers[0].engine.watchers == []


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
        scheduler.close()


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
    for own, other in zip(watched, plain, strict=True):
        assert bits(own.state_dict()) == bits(other.state_dict())
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
    for report in reports:  # as docs/checkpoints.py saves and loads them
        saved, loaded = report["resumed"]
        assert saved == loaded
