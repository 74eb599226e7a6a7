"""What workers tell each other before a step: changes on some of them, and values that drifted."""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from efsgd import CollectiveError, PowerSGDOptimizer, WorkerMismatchError
from efsgd.testing import lockstep, step_together
from efsgd.wire.collectives import intercept
from tests.simulation import a_run, bits, parameters_of, set_gradients, snapshot, step_with


def change_rank(optimizer: PowerSGDOptimizer) -> None:
    optimizer.param_groups[0]["rank"] = 1


def freeze(optimizer: PowerSGDOptimizer) -> None:
    parameters_of(optimizer)[0].requires_grad_(False)


def add_group(optimizer: PowerSGDOptimizer) -> None:
    parameter = torch.ones(6, 5, dtype=torch.float64, requires_grad=True)
    parameter.grad = torch.ones(6, 5, dtype=torch.float64)
    optimizer.add_param_group({"params": [parameter]})


def load(optimizer: PowerSGDOptimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


CHANGES: list[Callable[[PowerSGDOptimizer], None]] = [change_rank, freeze, add_group, load]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
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
    assert all(str(caught.value) in note for note in caught.value.__notes__)
    assert len(caught.value.__notes__) == world_size - 1
    assert bits(snapshot(workers)) == before


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
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
    assert kinds[-2:] == ["AllReduceMean"] * 2
    stats = workers[0].communication_stats()
    assert stats["collectives"] == 2
    assert stats["check_bytes_sent"] >= sum(traced.nbytes for traced in usual)
    assert [traced.kind for traced in step_together(workers)] == ["AllReduceMean"] * 2


def test_a_change_on_one_worker_alone_says_what_it_was() -> None:
    workers, scenario = a_run(3)
    step_with(workers, scenario.gradients(0))
    set_gradients(workers, scenario.gradients(1))
    for change, words in [
        (change_rank, r"workers 0, 2: rank=2 in the group of parameter 0; worker 1: rank=1"),
        (freeze, r"workers 0, 2: parameter 0, .* level 2; worker 1: parameter 0, .* frozen"),
    ]:
        kept = dict(workers[1].param_groups[0])
        change(workers[1])
        with pytest.raises(WorkerMismatchError, match=words):
            step_together(workers)
        workers[1].param_groups[0].update(kept)
        parameters_of(workers[1])[0].requires_grad_()


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


def test_a_change_that_is_undone_was_none() -> None:
    workers, scenario = a_run(2)
    twins, _ = a_run(2)
    for run in (workers, twins):
        step_with(run, scenario.gradients(0))
    workers[0].param_groups[0]["rank"] = 1
    set_gradients(workers, scenario.gradients(1))
    with pytest.raises(WorkerMismatchError, match="worker 0"):
        step_together(workers)
    workers[0].param_groups[0]["rank"] = twins[0].param_groups[0]["rank"]
    assert len(step_with(workers, scenario.gradients(1))) == 2
    step_with(twins, scenario.gradients(1))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


def test_a_change_in_several_sections_keeps_nobody_waiting() -> None:
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


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_on_one_worker_when_a_check_is_due_keeps_nobody_waiting(
    change: Callable[[PowerSGDOptimizer], None],
) -> None:
    workers, scenario = a_run(3, check_every=2)
    for step in range(2):
        step_with(workers, scenario.gradients(step))
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
    for step in range(2):
        step_with(workers, scenario.gradients(step))
    set_gradients(workers, scenario.gradients(2))
    change_rank(workers[1])
    for _ in range(2):
        with pytest.raises(WorkerMismatchError, match=r"worker 0: rank=2 .* worker 1: rank=1"):
            step_together(workers)
    change_rank(workers[0])
    step_together(workers)


def replace_momentum(optimizer: PowerSGDOptimizer) -> None:
    optimizer.state[parameters_of(optimizer)[0]]["momentum_buffer"] = torch.zeros(3)


def zero_rank(optimizer: PowerSGDOptimizer) -> None:
    optimizer.param_groups[0]["rank"] = 0


def infinite_lr(optimizer: PowerSGDOptimizer) -> None:
    optimizer.param_groups[0]["lr"] = math.inf


def no_rank(optimizer: PowerSGDOptimizer) -> None:
    del optimizer.param_groups[0]["rank"]


def differentiable(optimizer: PowerSGDOptimizer) -> None:
    optimizer.param_groups[0]["differentiable"] = True


MISTAKES = [replace_momentum, zero_rank, infinite_lr, no_rank, differentiable]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
@pytest.mark.parametrize("options", [{}, {"check_every": 2}, {"start_compressing_at": 2}], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_an_error_on_one_worker_keeps_nobody_waiting(
    steps: int, options: dict[str, int], mistake: Callable[[PowerSGDOptimizer], None]
) -> None:
    workers, scenario = a_run(3, **options)
    for step in range(steps):
        step_with(workers, scenario.gradients(step))
    set_gradients(workers, scenario.gradients(steps))
    group, state = workers[1].param_groups[0], workers[1].state[parameters_of(workers[1])[0]]
    kept = dict(group), dict(state)
    mistake(workers[1])
    before = bits(snapshot([workers[0], workers[2]]))
    for _ in range(2):
        with pytest.raises((CollectiveError, WorkerMismatchError), match="worker 1") as caught:
            step_together(workers)
        own, others = caught.value.__notes__
        assert own.startswith(("worker 1: ValueError", "worker 1: NotImplementedError"))
        assert type(caught.value).__name__ in others
    assert bits(snapshot([workers[0], workers[2]])) == before
    group.update(kept[0])
    state.update(kept[1])
    step_with(workers, scenario.gradients(steps))


def test_a_sparse_gradient_that_comes_with_a_change_elsewhere_is_known_to_all() -> None:
    workers, scenario = a_run(3)
    step_with(workers, scenario.gradients(0))
    for undo in (False, True):  # a change, then an error
        set_gradients(workers, scenario.gradients(1))
        parameter = parameters_of(workers[2])[0]
        parameter.grad = torch.ones_like(parameter).to_sparse()
        workers[1].param_groups[0]["rank"] = 0 if undo else 1
        with pytest.raises((CollectiveError, WorkerMismatchError), match="worker 1"):
            step_together(workers)
    workers[1].param_groups[0]["rank"] = 2
    step_with(workers, scenario.gradients(1))
    step_with(workers, scenario.gradients(2))


def test_what_a_compressor_raises_on_one_worker_reaches_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers, scenario = a_run(3)
    step_with(workers, scenario.gradients(0))
    set_gradients(workers, scenario.gradients(1))
    [bucket] = workers[1]._engine.plan.buckets
    compress = bucket.aggregator.compress

    def failing(*arguments: Any) -> Any:
        raise MemoryError("no memory left")
        yield

    before = bits(snapshot(workers))
    monkeypatch.setattr(bucket.aggregator, "compress", failing)
    with pytest.raises(CollectiveError, match="say themselves why: worker 1") as caught:
        step_together(workers)
    assert caught.value.__notes__[0] == "worker 1: MemoryError: no memory left"
    assert bits(snapshot(workers)) == before
    monkeypatch.setattr(bucket.aggregator, "compress", compress)
    step_together(workers)


def test_a_worker_without_a_scaler_skips_with_those_that_have_one() -> None:
    # As one that has joined: it steps without gradients, and its scaler does not ask for it.
    workers, scenario = a_run(3)
    step_with(workers, scenario.gradients(0))
    for overflows in (True, False):
        set_gradients(workers, scenario.gradients(1))
        for parameter in parameters_of(workers[0]):
            parameter.grad = None
        for worker in workers[1:]:
            worker.grad_scale = torch.tensor(2.0)
            worker.found_inf = torch.tensor(0.0)
        if overflows:
            workers[2].found_inf += 1
        before = bits(snapshot(workers))
        exchanges = [worker.exchange(3, place) for place, worker in enumerate(workers)]
        assert lockstep(exchanges).results == [not overflows] * 3
        assert (bits(snapshot(workers)) == before) == overflows
