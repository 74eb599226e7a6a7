"""Misuse: refused in words that say what was given and what to do, and nothing changes anywhere.

The errors that torch.optim.SGD raises for the same arguments have SGD's texts; they are compared in
tests/optimizers/swap_in/test_construction.py.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd import CollectiveError, NonFiniteGradientError, PowerSGDOptimizer, WorkerMismatchError
from efsgd.testing import step_together
from tests.optimizers.misuse import Case, Run, ids, usual
from tests.optimizers.misuse.settings import SETTINGS, changing
from tests.optimizers.misuse.table import CALLS, CHECKPOINTS, TENSORS
from tests.simulation import SHAPES, a_run, bits, make_workers, parameters_of, snapshot

Optimizers = list[PowerSGDOptimizer]


@pytest.mark.parametrize("case", ids([*SETTINGS, *TENSORS, *CALLS, *CHECKPOINTS]))
def test_what_one_worker_does(case: Case) -> None:
    run = Run()
    case.check(run)
    assert len(run.optimizer.param_groups) == 1
    run.assert_unchanged()
    run.assert_goes_on()


@pytest.mark.parametrize("case", ids(CHECKPOINTS))
def test_checkpoints_before_the_first_step(case: Case) -> None:
    run = Run(steps=0)
    case.check(run)
    run.assert_unchanged()
    run.assert_goes_on()


CHANGED = [case for case in SETTINGS if case.name.startswith(changing.__name__)]


@pytest.mark.parametrize("case", ids([*CHANGED, *TENSORS]))
def test_what_one_of_several_workers_does(case: Case) -> None:
    """It raises its own error; the others say who could not take part, and do not wait."""
    run = Run(3)
    with pytest.raises(CollectiveError, match="say themselves why: worker 1") as caught:
        case.act(run)
    own, other = caught.value.__notes__
    assert own.startswith(f"worker 1: {case.error.__name__}: ")
    assert case.given in own
    assert case.remedy in own
    assert other == f"worker 2: CollectiveError: {caught.value}"
    run.assert_unchanged()
    run.assert_goes_on()


# ---- workers that differ before the first step: worker 1 of three is made of something else -----

SAME = "All workers must construct the optimizer with the same parameters"
VALUES = "call optimizer.broadcast_parameters() on all of them"
OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "rank": 2}


def other_setting(name: str, value: Any, usually: Any, **both: Any) -> Case:
    """Worker 1 has another setting."""

    def act() -> Optimizers:
        workers, _ = a_run(3, **both)
        workers[1:2] = make_workers(usual(), 1, **{**OPTIONS, **both, name: value})
        return workers

    given = f"workers 0, 2: {name}={usually} in the group of parameter 0; worker 1: {name}={value}"
    return Case(f"{name}={value}", act, WorkerMismatchError, given, SAME)


def other_parameters(
    name: str, edit: Callable[[list[Tensor]], object], given: str, **options: Any
) -> Case:
    """Worker 1 has other parameters."""

    def act() -> Optimizers:
        workers, _ = a_run(3)
        parameters = usual()
        edit(parameters)
        workers[1:2] = make_workers(parameters, 1, **OPTIONS, **options)
        return workers

    return Case(name, act, WorkerMismatchError, given, SAME)


def frozen(*indices: int) -> Callable[[], Optimizers]:
    """Worker 1 does not train these parameters."""

    def act() -> Optimizers:
        workers, _ = a_run(3)
        for index in indices:
            parameters_of(workers[1])[index].requires_grad_(False)
        return workers

    return act


def other_value(name: str) -> Case:
    """Worker 1 has another value of some tensor, by little."""

    def act() -> Optimizers:
        workers, _ = a_run(3)
        p = parameters_of(workers[1])[2]
        with torch.no_grad():
            (p if name == "parameter" else workers[1].state[p][name])[0, 0] += 1e-9
        return workers

    what = "parameter 2" if name == "parameter" else f"{name} of parameter 2"
    given = f"{what} differs between workers: its values on worker 1"
    return Case(f"another {name}", act, WorkerMismatchError, given, VALUES)


def not_finite(bad: float) -> Case:
    def act() -> Optimizers:
        workers, _ = a_run(3)
        for optimizer in workers:
            for p in parameters_of(optimizer):
                p.grad = torch.ones_like(p)
        parameters_of(workers[1])[2].grad[3, 1] = bad
        return workers

    return Case(f"a gradient of {bad}", act, NonFiniteGradientError,
                "on worker 1 the gradient of parameter 2 is NaN or infinite",
                "pass nonfinite='skip'")  # fmt: skip


SGD_FORM = {"momentum_form": "sgd"}
MISMATCHES = [
    other_setting("lr", 0.5, 0.05),
    other_setting("momentum", 0.5, 0.9),
    other_setting("weight_decay", 0.1, 0),
    other_setting("dampening", 0.5, 0, **SGD_FORM),
    other_setting("nesterov", True, False, **SGD_FORM),
    other_setting("maximize", True, False),
    other_setting("momentum_form", "sgd", "paper"),
    other_setting("rank", 3, 2),
    other_setting("min_compression_rate", 0.5, 1),
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
    other_parameters("other groups", lambda ps: None, "in the group of parameter 1", cuts=(1,)),
    Case("a frozen parameter", frozen(2), WorkerMismatchError, "frozen", SAME),
    Case("nothing to train", frozen(0, 1, 2), WorkerMismatchError,
         "worker 1: parameter 0, frozen", SAME),
    *(other_value(name) for name in ("parameter", "momentum_buffer", "q")),
    *(not_finite(bad) for bad in (math.nan, math.inf, -math.inf)),
]  # fmt: skip


@pytest.mark.parametrize("case", ids(MISMATCHES))
def test_workers_that_differ(case: Case) -> None:
    """Every worker raises the same error with the same text, and has changed nothing."""
    workers = case.act()
    assert isinstance(workers, list)
    for optimizer in workers:
        for p in parameters_of(optimizer):
            p.grad = torch.ones_like(p) if p.grad is None else p.grad
    before = bits(snapshot(workers))
    caught = Case(case.name, step_together, case.error, case.given, case.remedy).check(workers)
    expected = [f"worker {w}: {case.error.__name__}: {caught.value}" for w in (1, 2)]
    assert caught.value.__notes__ == expected
    assert bits(snapshot(workers)) == before


def test_a_step_that_is_skipped_is_no_error() -> None:
    run = Run(nonfinite="skip")
    run.step_after(lambda o: [p.grad.fill_(math.nan) for p in parameters_of(o)])
    run.assert_unchanged()
    run.assert_goes_on()


def test_the_table_is_about_all_parameters() -> None:
    """What is `given` speaks of three parameters, two matrices and a vector."""
    assert [tuple(p.shape) for p in usual()] == SHAPES
