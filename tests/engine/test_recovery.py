"""After an error that all workers have heard of, they go on together."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from efsgd import PowerSGDOptimizer, Signum
from efsgd.engine import plan
from efsgd.testing import step_together
from tests.simulation import (
    a_run,
    bits,
    parameters_of,
    set_gradients,
    snapshot,
    step_with,
)


def is_heard_by_all(workers: list[Any], error: type[Exception]) -> None:
    """A step is an error of worker 0, which all others know of."""
    with pytest.raises(error) as caught:
        step_together(workers)
    notes = caught.value.__notes__
    assert len(notes) == len(workers) - 1
    assert all("Error: " in note and "worker 0" in note for note in notes)


@pytest.fixture
def exhausted(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """The workers that have no memory for buckets."""
    workers: set[int] = set()
    make_bucket = plan.make_bucket

    def limited(infos: Any, compressor: Any, context: Any, *rest: Any) -> Any:
        if context[1] in workers:
            raise MemoryError("no memory left")
        return make_bucket(infos, compressor, context, *rest)

    monkeypatch.setattr(plan, "make_bucket", limited)
    yield workers


def set_rank(workers: list[Any], rank: int) -> None:
    for worker in workers:
        worker.param_groups[0]["rank"] = rank


@pytest.mark.parametrize("rank", [1, 2], ids=["the new rank", "the old rank"])
def test_a_worker_that_could_not_make_its_plan_is_not_left_behind(
    exhausted: set[int], rank: int
) -> None:
    (workers, scenario), (twins, _) = a_run(3), a_run(3)
    for each in (workers, twins):
        step_with(each, scenario.gradients(0))
    set_rank(workers, 1)
    before = bits([parameters_of(worker) for worker in workers])
    exhausted.add(0)
    for _ in range(2):
        set_gradients(workers, scenario.gradients(1))
        is_heard_by_all(workers, MemoryError)
    assert bits([parameters_of(worker) for worker in workers]) == before
    exhausted.clear()
    for each in (workers, twins):
        set_rank(each, rank)
        for step in (1, 2):
            step_with(each, scenario.gradients(step))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


def test_a_plan_that_cannot_be_made_again_after_a_skipped_step_is_heard_of(
    exhausted: set[int],
) -> None:
    (workers, scenario), (twins, _) = a_run(3, nonfinite="skip"), a_run(3, nonfinite="skip")
    for each in (workers, twins):
        step_with(each, scenario.gradients(0))
        set_rank(each, 1)
    set_gradients(workers, scenario.gradients(1))
    gradient = parameters_of(workers[1])[0].grad
    assert gradient is not None
    gradient.fill_(torch.nan)
    step_together(workers)
    assert workers[0].communication_stats()["skipped_steps"] == 1
    exhausted.add(0)
    for _ in range(2):
        set_gradients(workers, scenario.gradients(1))
        is_heard_by_all(workers, MemoryError)
    exhausted.clear()
    for each in (workers, twins):
        for step in (1, 2):
            step_with(each, scenario.gradients(step))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


def delete(group: dict[str, Any]) -> None:
    del group["momentum"]


MISTAKES: dict[str, Callable[[dict[str, Any]], None]] = {
    "none": lambda group: group.update(momentum=None),
    "a word": lambda group: group.update(momentum="bad"),
    "two numbers": lambda group: group.update(momentum=torch.zeros(2)),
    "no entry": delete,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_momentum_of_signum_that_is_none_keeps_nobody_waiting(mistake: str) -> None:
    models = [[torch.ones(6, 4, requires_grad=True)] for _ in range(2)]
    workers = [Signum(model, lr=0.1) for model in models]
    for worker, model in enumerate(models):
        model[0].grad = torch.full((6, 4), 1.0 + worker)
    step_together(workers)
    group = workers[0].param_groups[0]
    kept, before = dict(group), bits(models)
    MISTAKES[mistake](group)
    for _ in range(2):
        is_heard_by_all(workers, ValueError if mistake == "no entry" else TypeError)
    assert bits(models) == before
    group.update(kept)
    step_together(workers)
    assert bits(models[0]) == bits(models[1]) != before


def after_two_steps(**options: Any) -> tuple[PowerSGDOptimizer, list[torch.Tensor]]:
    parameters = [torch.ones(12, 10, requires_grad=True) for _ in range(3)]
    optimizer = PowerSGDOptimizer([{"params": list(parameters), **options}], lr=0.5)
    for parameter in parameters:
        parameter.grad = torch.ones(12, 10)
    optimizer.step()
    optimizer.step()  # what groups say is as it was in the step before
    return optimizer, parameters


def test_settings_of_single_parameters_move_with_them() -> None:
    optimizer, parameters = after_two_steps(per_parameter={"rank": [1, 2, 3]})
    group = optimizer.param_groups[0]
    group["params"].pop(0)
    optimizer.step()
    assert group["per_parameter"] == {"rank": (2, 3)}
    group["params"][:] = [parameters[2], parameters[0]]
    assert optimizer.state_dict()["param_groups"][0]["per_parameter"] == {"rank": (3, 1)}
    group["params"].clear()
    optimizer.step()
    group["params"].extend(parameters)
    optimizer.step()
    assert group["per_parameter"] == {"rank": (1, 2, 3)}
    # Set anew, together with other parameters, it is what was set.
    group["params"].pop()
    group["per_parameter"] = {"rank": (4, 3)}
    optimizer.step()
    assert group["per_parameter"] == {"rank": (4, 3)}


def test_what_changes_in_place_is_noticed() -> None:
    optimizer, parameters = after_two_steps()
    group = optimizer.param_groups[0]
    group["lr"], group["notes"] = torch.tensor(0.5), np.arange(3)
    optimizer.step()
    group["lr"].zero_()
    group["notes"] = np.arange(4)  # of the user, and compared with nothing
    before = bits(parameters)
    optimizer.step()
    assert bits(parameters) == before
