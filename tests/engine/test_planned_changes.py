"""What a change of single parameters' settings costs, and what is left of one that fails."""

import copy
from typing import Any

import pytest
import torch

from efsgd import CollectiveError, NonFiniteGradientError, PowerSGDOptimizer, WorkerMismatchError
from efsgd.testing import step_together
from tests.rank.rank_changes import set_own
from tests.simulation import (
    a_run,
    bits,
    make_workers,
    parameters_of,
    replicated,
    set_gradients,
    snapshot,
    step_with,
    train,
)
from tests.strategies import Scenario

REDUCE, GATHER = "AllReduceMean", "AllGather"
# A lower and a higher rank; and one that needs what it has never had, beside one that needs
# nothing any more.
CHANGES: dict[str, dict[str, Any]] = {
    "lower and higher": {"rank": (1, None, 4)},
    "sent as it is": {"min_compression_rate": (float("inf"), None, None)},
    "compressed for the first time": {"rank": (2, None, 2), "min_compression_rate": (0.0,) * 3},
}


def before_it(change: str) -> dict[str, Any]:
    """Options of workers that are to change."""
    is_first = change == "compressed for the first time"
    return {"min_compression_rate": float("inf")} if is_first else {}


def trained(world_size: int, steps: int, **options: Any) -> tuple[list[Any], Scenario]:
    workers, scenario = a_run(world_size, **options)
    train(scenario, range(steps), workers)
    return workers, scenario


def plan(workers: list[PowerSGDOptimizer], own: dict[str, Any]) -> None:
    set_own(workers, own)
    for worker in workers:
        worker.plan_change()


# ---- what it costs ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_planned", [True, False])
@pytest.mark.parametrize("own", [CHANGES["lower and higher"], {}], ids=["a change", "none"])
def test_a_change_costs_comparisons_and_unplanned_the_step_before(
    own: dict[str, Any], is_planned: bool
) -> None:
    workers, scenario = trained(3, 2)
    usual = step_with(workers, scenario.gradients(2))
    assert [traced.kind for traced in usual] == [REDUCE] * 2
    set_own(workers, own)
    if is_planned:
        plan(workers, own)
    trace = step_with(workers, scenario.gradients(3))
    if own and not is_planned:
        # The collectives of the step before, all zeros; then as for a change that is planned.
        assert [(t.kind, t.shape) for t in trace[:2]] == [(t.kind, t.shape) for t in usual]
        trace = trace[2:]
    # What all have in common is compared, then how they round, and the step is taken.
    compared = 2 if own else int(is_planned)
    assert [traced.kind for traced in trace] == [GATHER] * compared + [REDUCE] * 2
    assert all(t.purpose == "digests of settings, parameters and state" for t in trace[:compared])
    assert sum(t.nbytes for t in trace[:compared]) == compared * 24
    assert [t.kind for t in step_with(workers, scenario.gradients(4))] == [REDUCE] * 2


def test_planned_or_not_the_step_is_the_same() -> None:
    runs = []
    for is_planned in (False, True):
        workers, scenario = trained(3, 2)
        set_own(workers, CHANGES["lower and higher"])
        if is_planned:
            plan(workers, CHANGES["lower and higher"])
        train(scenario, range(2, 5), workers)
        runs.append(bits(snapshot(workers)))
    assert runs[0] == runs[1]


# ---- what may go wrong --------------------------------------------------------------------------


def test_workers_that_plan_different_changes_all_raise() -> None:
    workers, scenario = trained(3, 2)
    set_gradients(workers, scenario.gradients(2))
    plan(workers, {"rank": (1, None, 4)})
    set_own(workers[2:], {"rank": (1, None, 3)})
    before = bits(snapshot(workers))
    words = r"workers 0, 1: parameter 2, .* with rank=4 of its own; worker 2: .* with rank=3"
    for _ in range(2):  # they go on to say so
        with pytest.raises(WorkerMismatchError, match=words) as caught:
            step_together(workers)
        assert len(caught.value.__notes__) == 2
        assert all(str(caught.value) in note for note in caught.value.__notes__)
        assert bits(snapshot(workers)) == before
    set_own(workers, {"rank": (1, None, 3)})
    trace = step_together(workers)
    assert [traced.kind for traced in trace] == [GATHER] * 2 + [REDUCE] * 2
    twins, _ = trained(3, 2)
    set_own(twins, {"rank": (1, None, 3)})
    step_with(twins, scenario.gradients(2))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


@pytest.mark.parametrize(
    "own", [{"rank": (1, None, 0)}, {"rank": (1, 2)}, {"rank": "123"}, {"seed": (1, 2, 3)}], ids=str
)
def test_a_worker_whose_settings_make_no_sense_is_heard_by_all(own: dict[str, Any]) -> None:
    workers, scenario = trained(3, 2)
    set_gradients(workers, scenario.gradients(2))
    plan(workers, {"rank": (1, None, 4)})
    workers[1].param_groups[0]["per_parameter"] = own
    before = bits([parameters_of(worker) for worker in workers])
    states = bits([worker.state_dict()["state"] for worker in workers])
    words = r"worker 1: cannot take part: .*Invalid"
    with pytest.raises(WorkerMismatchError, match=words) as caught:
        step_together(workers)
    assert any("worker 1: " in note and "Invalid" in note for note in caught.value.__notes__)
    assert bits([parameters_of(worker) for worker in workers]) == before
    assert bits([worker.state_dict()["state"] for worker in workers]) == states
    set_own(workers, {"rank": (1, None, 4)})
    step_together(workers)
    assert replicated(workers[0]) == replicated(workers[1]) == replicated(workers[2])


@pytest.mark.parametrize(
    ("change", "is_planned", "alternating"),
    [*((change, True, False) for change in CHANGES),
     ("lower and higher", False, False), ("lower and higher", True, True)],
)  # fmt: skip
def test_a_change_whose_step_fails_leaves_no_trace(
    change: str, is_planned: bool, alternating: bool
) -> None:
    options = {"alternating": alternating, **before_it(change)}

    def started() -> list[Any]:
        workers, _ = trained(3, 2, **options)
        set_own(workers, CHANGES[change])
        if is_planned:
            plan(workers, CHANGES[change])
        return workers

    scenario = a_run(3)[1]
    twins, workers = started(), started()
    trace = step_with(twins, scenario.gradients(2))
    assert trace[0].kind == (GATHER if is_planned else REDUCE)
    before = bits(snapshot(workers))
    for fail_at in range(len(trace)):
        workers = started()
        with pytest.raises(CollectiveError, match="injected failure"):
            step_with(workers, scenario.gradients(2), fail_at=fail_at)
        assert bits(snapshot(workers)) == before
        # Another failure, now that part of the way is known; then it works.
        with pytest.raises(CollectiveError, match="injected failure"):
            step_with(workers, scenario.gradients(2), fail_at=0 if alternating else 1)
        assert bits(snapshot(workers)) == before
        step_with(workers, scenario.gradients(2))
        assert bits(snapshot(workers)) == bits(snapshot(twins))
    for each in (workers, twins):
        step_with(each, scenario.gradients(3))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_is_taken_back_after_it_failed_was_none(change: str) -> None:
    options = before_it(change)
    (workers, scenario), (twins, _) = trained(2, 2, **options), trained(2, 2, **options)
    set_own(workers, CHANGES[change])
    count = len(step_with(copy.deepcopy(workers), scenario.gradients(2)))
    with pytest.raises(CollectiveError):
        step_with(workers, scenario.gradients(2), fail_at=count - 1)
    for worker in workers:
        worker.param_groups[0]["per_parameter"] = None
    train(scenario, range(2, 4), workers, twins)
    assert bits(snapshot(workers)) == bits(snapshot(twins))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_change_whose_step_is_refused_comes_with_the_next(change: str, nonfinite: str) -> None:
    options = {"nonfinite": nonfinite, **before_it(change)}
    (workers, scenario), (twins, _) = trained(2, 2, **options), trained(2, 2, **options)
    for each in (workers, twins):
        plan(each, CHANGES[change])
    before = bits(snapshot(workers))
    bad = scenario.gradients(2)[:2]
    bad[1][0] = torch.full_like(bad[1][0], torch.nan)
    for _ in range(2):
        if nonfinite == "raise":
            with pytest.raises(NonFiniteGradientError):
                step_with(workers, bad)
        else:
            step_with(workers, bad)
        assert bits(snapshot(workers)) == before
    for step in range(2, 4):
        for each in (workers, twins):
            step_with(each, scenario.gradients(step)[:2])
    assert bits(snapshot(workers)) == bits(snapshot(twins))


def test_a_worker_alone_undoes_it_as_well() -> None:
    [optimizer] = make_workers([torch.ones(12, 10)], 1, lr=0.1, rank=2)
    [parameter] = parameters_of(optimizer)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = bits(snapshot([optimizer])[0][1]["state"])
    set_own([optimizer], {"rank": (4,)})
    parameter.grad = torch.full_like(parameter, torch.nan)
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    assert bits(snapshot([optimizer])[0][1]["state"]) == before
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[parameter]["q"].shape == (10, 4)
