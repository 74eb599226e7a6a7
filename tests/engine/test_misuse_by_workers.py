"""Workers that do not fit together: all of them say so, in the same words, and nothing changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from efsgd import NonFiniteGradientError, PowerSGDOptimizer, WorkerMismatchError
from efsgd.testing import step_together
from tests.optimizers.misuse import Case, ids
from tests.simulation import (
    SHAPES,
    a_run,
    bits,
    make_workers,
    parameters_of,
    replicated,
    set_gradients,
    snapshot,
    step_with,
)

SAME = "All workers must construct the optimizer with the same parameters"
VALUES = "call optimizer.broadcast_parameters() on all of them"
OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "rank": 2}


def odd_one(parameters: list[torch.Tensor], **options: Any) -> list[PowerSGDOptimizer]:
    """Three workers, of which worker 1 is made of something else."""
    workers, _ = a_run(3)
    workers[1:2] = make_workers(parameters, 1, **{**OPTIONS, **options})
    return workers


def usual() -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters_of(a_run(1)[0][0])]


def other_setting(name: str, value: Any, usually: Any, **both: Any) -> Case:
    """Worker 1 has another setting."""

    def act() -> list[PowerSGDOptimizer]:
        workers, _ = a_run(3, **both)
        workers[1:2] = make_workers(usual(), 1, **{**OPTIONS, **both, name: value})
        return workers

    given = f"workers 0, 2: {name}={usually} in the group of parameter 0; worker 1: {name}={value}"
    return Case(f"{name}={value}", act, WorkerMismatchError, given, SAME)


def other_parameters(name: str, edit: Callable[[list[torch.Tensor]], object], given: str) -> Case:
    """Worker 1 has other parameters."""

    def act() -> list[PowerSGDOptimizer]:
        parameters = usual()
        edit(parameters)
        return odd_one(parameters)

    return Case(name, act, WorkerMismatchError, given, SAME)


def frozen() -> list[PowerSGDOptimizer]:
    workers, _ = a_run(3)
    parameters_of(workers[1])[2].requires_grad_(False)
    return workers


def grouped() -> list[PowerSGDOptimizer]:
    workers, _ = a_run(3)
    workers[1:2] = make_workers(usual(), 1, cuts=(1,), **OPTIONS)
    return workers


def other_value(name: str) -> Callable[[], list[PowerSGDOptimizer]]:
    def act() -> list[PowerSGDOptimizer]:
        workers, _ = a_run(3)
        p = parameters_of(workers[1])[2]
        for optimizer in workers:  # as after a step: a momentum that is not zero has begun
            for state in optimizer.state.values():
                state["momentum_started"].fill_(True)
        with torch.no_grad():
            (p if name == "parameter" else workers[1].state[p][name])[0, 0] += 1e-3
        return workers

    return act


SGD_FORM = {"momentum_form": "sgd"}
CASES = [
    other_setting("lr", 0.5, 0.05),
    other_setting("momentum", 0.5, 0.9),
    other_setting("weight_decay", 0.1, 0),
    other_setting("dampening", 0.5, 0, **SGD_FORM),
    other_setting("nesterov", True, False, **SGD_FORM),
    other_setting("maximize", True, False),
    other_setting("momentum_form", "sgd", "paper"),
    other_setting("rank", 3, 2),
    other_setting("min_compression_rate", 0.5, 1.0),
    other_setting("error_feedback", False, True),
    other_setting("warm_start", False, True),
    other_setting("start_compressing_at", 5, 0),
    other_setting("nonfinite", "skip", "raise"),
    other_setting("seed", 1, 11),
    other_parameters("another shape", lambda ps: ps.__setitem__(0, torch.zeros(12, 11)),
                     "worker 1: parameter 0, shape [12, 11]"),
    other_parameters("another dtype", lambda ps: ps.__setitem__(2, ps[2].float()),
                     "worker 1: parameter 2, shape [12, 10], float32"),
    other_parameters("another order", lambda ps: ps.insert(0, ps.pop(1)),
                     "worker 1: parameter 0, shape [10]"),
    other_parameters("one parameter less", lambda ps: ps.pop(),
                     "workers 0, 2: parameter 2, shape [12, 10]"),
    other_parameters("one parameter more", lambda ps: ps.append(torch.zeros(3)),
                     "worker 1: parameter 3, shape [3]"),
    Case("a frozen parameter", frozen, WorkerMismatchError, "frozen", SAME),
    Case("other groups", grouped, WorkerMismatchError, "in the group of parameter 1", SAME),
    Case("another value", other_value("parameter"), WorkerMismatchError,
         "parameter 2 differs between workers: its values on worker 1", VALUES),
    Case("another momentum", other_value("momentum_buffer"), WorkerMismatchError,
         "momentum_buffer of parameter 2 differs between workers: its values on worker 1", VALUES),
    Case("another q", other_value("q"), WorkerMismatchError,
         "q of parameter 2 differs between workers: its values on worker 1", VALUES),
]  # fmt: skip


def assert_all_raise(
    workers: list[PowerSGDOptimizer], error: type[Exception], words: tuple[str, ...]
) -> None:
    """Every worker raises the same error with the same text, and has changed nothing."""
    for optimizer in workers:
        for p in parameters_of(optimizer):
            p.grad = torch.ones_like(p)
    before = bits(snapshot(workers))
    with pytest.raises(error) as caught:
        step_together(workers)
    text = str(caught.value)
    assert all(word in text for word in words), text
    expected = [f"worker {w}: {error.__name__}: {text}" for w in range(1, len(workers))]
    assert caught.value.__notes__ == expected
    assert bits(snapshot(workers)) == before


@pytest.mark.parametrize("case", ids(CASES))
def test_before_the_first_step(case: Case) -> None:
    workers = case.act()
    assert isinstance(workers, list)
    assert_all_raise(workers, case.error, (case.given, case.remedy))


def one_setting(name: str, value: Any) -> Callable[[PowerSGDOptimizer], object]:
    return lambda optimizer: optimizer.param_groups[0].__setitem__(name, value)


def freeze(optimizer: PowerSGDOptimizer) -> None:
    parameters_of(optimizer)[0].requires_grad_(False)


def add_group(optimizer: PowerSGDOptimizer) -> None:
    optimizer.add_param_group({"params": [torch.zeros(9, 8, dtype=torch.float64).requires_grad_()]})


CHANGES = {
    "rank": one_setting("rank", 3),
    "rate": one_setting("min_compression_rate", 9.0),
    "feedback": one_setting("error_feedback", False),
    "start": one_setting("start_compressing_at", 99),
    "seed": one_setting("seed", 3),
    "freezing": freeze,
    "another group": add_group,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_on_one_worker_alone(change: str) -> None:
    """In mid-run; and once the others have changed alike, training goes on."""
    workers, scenario = a_run(3)
    for step in range(2):
        step_with(workers, scenario.gradients(step))

    def set_all_gradients() -> None:
        for worker, optimizer in enumerate(workers):
            for p in parameters_of(optimizer):
                p.grad = torch.full_like(p, worker + 1.0) if p.requires_grad else None

    CHANGES[change](workers[1])
    set_all_gradients()
    before = bits([parameters_of(optimizer) for optimizer in workers])
    with pytest.raises(WorkerMismatchError, match="worker 1 has changed what it trains") as caught:
        step_together(workers)
    assert "must change on all workers before the same step" in str(caught.value)
    expected = [f"worker {w}: WorkerMismatchError: {caught.value}" for w in (1, 2)]
    assert caught.value.__notes__ == expected
    assert bits([parameters_of(optimizer) for optimizer in workers]) == before
    CHANGES[change](workers[0])
    CHANGES[change](workers[2])
    set_all_gradients()
    step_together(workers)
    assert replicated(workers[0]) == replicated(workers[1]) == replicated(workers[2])


def test_a_bad_gradient_of_one_worker() -> None:
    workers, scenario = a_run(3)
    set_gradients(workers, scenario.gradients(0))
    parameters_of(workers[2])[1].grad[3] = torch.nan
    before = bits(snapshot(workers))
    with pytest.raises(
        NonFiniteGradientError, match="on worker 2 the gradient of parameter 1"
    ) as e:
        step_together(workers)
    assert e.value.__notes__ == [f"worker {w}: NonFiniteGradientError: {e.value}" for w in (1, 2)]
    assert bits(snapshot(workers)) == before


def test_the_table_is_about_all_parameters() -> None:
    """`given` above speaks of three parameters, two matrices and a vector."""
    assert [tuple(p.shape) for p in usual()] == SHAPES
