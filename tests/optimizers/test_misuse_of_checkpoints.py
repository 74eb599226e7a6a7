"""Corrupt and foreign checkpoints: refused in words, and the optimizer stays as it is."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from efsgd import PowerSGDOptimizer
from tests.optimizers.misuse import Case, Run, ids
from tests.optimizers.test_misuse import INTEGER, RATE, STEPS, WHOLE, fits
from tests.simulation import make_workers, step_with


def loading(
    name: str, edit: Callable[[dict[str, Any]], object], error: type, given: str, remedy: str
) -> Case:
    """A good state_dict, edited, and loaded."""

    def act(run: Run) -> None:
        saved = copy.deepcopy(run.optimizer.state_dict())
        replaced = edit(saved)
        run.optimizer.load_state_dict(saved if replaced is None else replaced)

    return Case(name, act, error, given, remedy)


def setting(name: str, value: Any, remedy: str, error: type = ValueError) -> Case:
    def edit(saved: dict[str, Any]) -> None:
        saved["param_groups"][0][name] = value

    return loading(f"{name}={value!r}", edit, error, f"Invalid {name}: {value!r}", remedy)


def replacing(name: str, value: Any, given: str, remedy: str, error: type = ValueError) -> Case:
    def edit(saved: dict[str, Any]) -> None:
        saved["state"][0][name] = value

    kind = list(value.shape) if isinstance(value, torch.Tensor) else repr(value)
    return loading(f"{name} of {kind}", edit, error, given, remedy)


def contradiction(saved: dict[str, Any]) -> None:
    saved["param_groups"][0].update(nesterov=True)


def of_another_model(_: dict[str, Any]) -> dict[str, Any]:
    """As many parameters, of other shapes."""
    other = make_workers([torch.zeros(6, 5), torch.zeros(7), torch.zeros(6, 5)], 1, momentum=0.9)
    step_with(other, [[torch.ones(6, 5), torch.ones(7), torch.ones(6, 5)]])
    return other[0].state_dict()


CASES = [
    *(setting("rank", bad, INTEGER) for bad in (0, "2", 2.0, None)),
    *(setting("min_compression_rate", bad, RATE) for bad in (-1.0, "1", math.nan)),
    setting("momentum_form", "torch", "Must be 'paper' or 'sgd'"),
    setting("nonfinite", "ignore", "Must be 'raise' or 'skip'"),
    setting("error_feedback", "True", "Must be a bool"),
    setting("warm_start", None, "Must be a bool"),
    setting("start_compressing_at", "0", STEPS),
    setting("seed", "0", "Must be an integer, at least 0"),
    *(setting("step", bad, STEPS) for bad in ("2", None, -1, 2.5)),
    loading("nesterov in the paper's form", contradiction, ValueError,
            "nesterov=True", "Pass momentum_form='sgd'"),
    replacing("momentum_buffer", torch.zeros(10, 12), *fits("momentum_buffer", [10, 12], [12, 10])),
    replacing("error", torch.zeros(12), *fits("error", [12], [12, 10])),
    loading("another model", of_another_model, ValueError,
            *fits("momentum_buffer", [6, 5], [12, 10])),
]  # fmt: skip


@pytest.mark.parametrize("case", ids(CASES))
def test_loading(case: Case) -> None:
    run = Run()
    case.check(run)
    run.assert_unchanged()
    run.assert_goes_on()


@pytest.mark.parametrize("case", ids(CASES))
def test_loading_before_the_first_step(case: Case) -> None:
    run = Run(steps=0)
    case.check(run)
    run.assert_unchanged()
    run.assert_goes_on()


def test_steps_that_differ_between_groups() -> None:
    parameters = [torch.ones(12, 10, requires_grad=True) for _ in range(2)]
    optimizer = PowerSGDOptimizer([{"params": [p]} for p in parameters], lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["step"] = 5
    with pytest.raises(ValueError, match=r"Invalid step: \[0, 5\]") as caught:
        optimizer.load_state_dict(saved)
    assert WHOLE in str(caught.value)
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]
