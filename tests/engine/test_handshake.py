"""What workers tell each other before a step: changes on some of them, and values that drifted."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from efsgd import CollectiveError, PowerSGDOptimizer, WorkerMismatchError
from efsgd.testing import lockstep, step_together
from efsgd.wire.collectives import intercept
from tests.simulation import (
    a_run,
    bits,
    parameters_of,
    replicated,
    set_gradients,
    snapshot,
    step_with,
    train,
    unchanged,
)


def change(name: str, value: Any) -> Callable[[PowerSGDOptimizer], None]:
    return lambda optimizer: optimizer.param_groups[0].update({name: value})


def freeze(optimizer: PowerSGDOptimizer) -> None:
    parameters_of(optimizer)[0].requires_grad_(False)


def add_group(optimizer: PowerSGDOptimizer) -> None:
    parameter = torch.ones(6, 5, dtype=torch.float64, requires_grad=True)
    parameter.grad = torch.ones(6, 5, dtype=torch.float64)
    optimizer.add_param_group({"params": [parameter]})


def load(optimizer: PowerSGDOptimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


change_rank = change("rank", 1)
CHANGES: dict[str, Callable[[PowerSGDOptimizer], None]] = {
    "rank": change_rank,
    "rate": change("min_compression_rate", 9.0),
    "feedback": change("error_feedback", False),
    "start": change("start_compressing_at", 99),
    "seed": change("seed", 3),
    "freezing": freeze,
    "another group": add_group,
    "loading": load,
}
a_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@a_change
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_change_on_one_worker_alone_is_an_error_on_all(
    change: Callable[[PowerSGDOptimizer], None], world_size: int
) -> None:
    workers, scenario = a_run(world_size)
    step_with(workers, scenario.gradients(0))
    set_gradients(workers, scenario.gradients(1))
    change(workers[1])
    before = bits(snapshot(workers))
    # All of them raise, or lockstep would say that some wait for ever.
    with pytest.raises(WorkerMismatchError, match="worker 1 has changed what it trains") as caught:
        step_together(workers)
    assert "on all workers before the same step" in str(caught.value)
    expected = [f"worker {w}: WorkerMismatchError: {caught.value}" for w in range(1, world_size)]
    assert caught.value.__notes__ == expected
    assert bits(snapshot(workers)) == before
    for optimizer in (workers[0], *workers[2:]):  # once the others have changed alike, it goes on
        change(optimizer)
    step_together(workers)
    assert all(replicated(optimizer) == replicated(workers[0]) for optimizer in workers)


@a_change
def test_a_change_on_all_workers_is_announced_once(
    change: Callable[[PowerSGDOptimizer], None],
) -> None:
    workers, scenario = a_run(3)
    for step in range(2):
        usual = step_with(workers, scenario.gradients(step))
    set_gradients(workers, scenario.gradients(2))
    for optimizer in workers:
        change(optimizer)
    kinds = [traced.kind for traced in step_together(workers)]
    # The collectives of the step before, full of zeros; then plans are compared; then the step.
    assert kinds[:3] == ["AllReduceMean"] * 2 + ["AllGather"]
    stats = workers[0].communication_stats()
    later = [traced.kind for traced in step_together(workers)]
    assert kinds[-stats["collectives"] :] == later == ["AllReduceMean"] * len(later)
    assert stats["check_bytes_sent"] >= sum(traced.nbytes for traced in usual)


def test_a_change_on_one_worker_alone_says_what_it_was() -> None:
    workers, scenario = a_run(3)
    step_with(workers, scenario.gradients(0))
    set_gradients(workers, scenario.gradients(1))
    for change, words in [
        (change_rank, r"workers 0, 2: rank=2 in the group of parameter 0; worker 1: rank=1"),
        (freeze, r"workers 0, 2: parameter 0, .* level 2; worker 1: parameter 0, frozen"),
    ]:
        kept = dict(workers[1].param_groups[0])
        change(workers[1])
        with pytest.raises(WorkerMismatchError, match=words):
            step_together(workers)
        workers[1].param_groups[0].update(kept)
        parameters_of(workers[1])[0].requires_grad_()
    assert len(step_together(workers)) == 2  # what is undone was no change


@pytest.mark.parametrize("change", [None, change_rank, lambda o: o.param_groups[0].update(rank=0)])
def test_every_buffer_is_counted_though_the_step_is_refused(change: Any) -> None:
    workers, scenario = a_run(2)
    step_with(workers, scenario.gradients(0))
    set_gradients(workers, scenario.gradients(1))
    if change is not None:
        change(workers[1])
    before = [worker.communication_stats()["total_bytes_sent"] for worker in workers]
    sent: list[list[int]] = [[], []]
    exchanges = [
        intercept(worker.exchange(2, place), lambda c, own=own: own.append(c.buffer.nbytes))
        for place, (worker, own) in enumerate(zip(workers, sent, strict=True))
    ]
    refusal = pytest.raises((CollectiveError, WorkerMismatchError), match="worker 1")
    with contextlib.nullcontext() if change is None else refusal:
        lockstep(exchanges)
    after = [worker.communication_stats()["total_bytes_sent"] for worker in workers]
    assert [b - a for a, b in zip(before, after, strict=True)] == [sum(own) for own in sent]
    assert sum(sent[0]) == sum(sent[1]) > 0


def test_a_change_in_several_buckets_keeps_nobody_waiting() -> None:
    # Two dtypes make two buckets, each with collectives of its own.
    workers = []
    for worker in range(2):
        parameters = [torch.ones(8, 6), torch.ones(8, 6, dtype=torch.float64), torch.ones(3)]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, worker)
            parameter.requires_grad_()
        workers.append(PowerSGDOptimizer(parameters, lr=0.1, rank=1))
    assert len(step_together(workers)) == 3 + 4  # plans, gradients, and rounding; then the step
    workers[0].param_groups[0]["rank"] = 2
    with pytest.raises(WorkerMismatchError, match="worker 0 has changed"):
        step_together(workers)
    workers[1].param_groups[0]["rank"] = 2
    assert len(step_together(workers)) == 4 + 2 + 4


@a_change
def test_a_change_on_one_worker_when_a_check_is_due_keeps_nobody_waiting(
    change: Callable[[PowerSGDOptimizer], None],
) -> None:
    workers, scenario = a_run(3, check_every=2)
    train(scenario, range(2), workers)
    set_gradients(workers, scenario.gradients(2))
    change(workers[1])
    before = bits(snapshot(workers))
    if change is load:  # the comparison shows that it has loaded what all have
        step_together(workers)
        return
    for _ in range(2):  # nor a second time
        with pytest.raises(WorkerMismatchError, match="Workers disagree about what they train"):
            step_together(workers)
    assert bits(snapshot(workers)) == before


def test_a_change_on_one_worker_when_compression_begins_keeps_nobody_waiting() -> None:
    workers, scenario = a_run(2, start_compressing_at=2)
    train(scenario, range(2), workers)
    set_gradients(workers, scenario.gradients(2))
    change_rank(workers[1])
    for _ in range(2):
        with pytest.raises(WorkerMismatchError, match=r"worker 0: rank=2 .* worker 1: rank=1"):
            step_together(workers)
    change_rank(workers[0])
    step_together(workers)


# ---- values that drifted, found by the checks of `check_every` -----------------------------------


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("parameter", "parameter 2 differs"),
        ("momentum_buffer", "momentum_buffer of parameter 2 differs"),
        ("q", "q of parameter 2 differs"),
        ("lr", r"worker 0: lr=0\.05 .* worker 1: lr=0\.06"),
        ("nonfinite", "worker 1: nonfinite=skip"),
    ],
)
def test_what_drifted_is_found_when_the_check_is_due(key: str, words: str) -> None:
    workers, scenario = a_run(2, check_every=3)
    train(scenario, range(3), workers)
    last, parameter = workers[1], parameters_of(workers[1])[2]
    if key == "parameter":
        parameter.data[0, 0] += 1e-12
    elif key in last.state[parameter]:
        last.state[parameter][key][0, 0] += 1e-12
    else:
        last.param_groups[0][key] = {"lr": 0.06, "nonfinite": "skip"}[key]
    set_gradients(workers, scenario.gradients(3))
    with unchanged(workers), pytest.raises(WorkerMismatchError, match=words):
        step_together(workers)


def test_what_drifted_is_not_found_before_that() -> None:
    workers, scenario = a_run(2, check_every=3)
    step_with(workers, scenario.gradients(0))
    parameters_of(workers[1])[2].data[0, 0] += 1e-12
    for step in (1, 2):
        assert len(step_with(workers, scenario.gradients(step))) == 2
    with pytest.raises(WorkerMismatchError, match="parameter 2 differs"):
        step_with(workers, scenario.gradients(3))


def test_a_check_is_one_small_collective_every_check_every_steps() -> None:
    workers, scenario = a_run(2, check_every=2)
    sizes = []
    for step in range(5):
        trace = step_with(workers, scenario.gradients(step % 4))
        sizes.append([traced.nbytes for traced in trace if traced.kind == "AllGather"])
    assert sizes[1:] == [[], [24], [], [24]]
    assert len(sizes[0]) == 3


@pytest.mark.parametrize("later", [2, 3])
def test_check_every_may_not_change_on_one_worker(later: int) -> None:
    workers, scenario = a_run(2, check_every=2)
    train(scenario, range(later), workers)
    workers[1].param_groups[0]["check_every"] = 3
    with pytest.raises(WorkerMismatchError, match="worker 1"):
        step_with(workers, scenario.gradients(later))


@pytest.mark.parametrize("thawed", [{0}, {1, 2}, {0, 1, 2}], ids=str)
def test_where_nothing_is_trained_workers_still_hear_of_each_other(thawed: set[int]) -> None:
    """No gradient is sent then, with which a worker could say that it has something new."""
    workers, scenario = a_run(3)
    train(scenario, range(1), workers)
    for worker in workers:
        for parameter in parameters_of(worker):
            parameter.requires_grad_(False)
    train(scenario, range(1, 3), workers)
    for number in thawed:
        parameters_of(workers[number])[0].requires_grad_(True)
    set_gradients(workers, scenario.gradients(3))
    if len(thawed) == len(workers):
        step_together(workers)
        assert workers[0].communication_stats()["steps"] == 4
        return
    before = bits(snapshot(workers))
    with pytest.raises(WorkerMismatchError, match="frozen"):
        step_together(workers)
    assert bits(snapshot(workers)) == before
