"""Bad arguments, settings and calls of one worker: refused in words, and nothing changes.

The errors that torch.optim.SGD raises for the same arguments have SGD's texts; they are compared in
tests/optimizers/swap_in/test_construction.py.
"""

import math
from typing import Any

import pytest
import torch

from efsgd import ErrorFeedbackSGD, NonFiniteGradientError, PowerSGD, PowerSGDOptimizer
from tests.optimizers.misuse import Case, Run, a_parameter, ids, invalid
from tests.simulation import parameters_of, set_gradients, step_with

INTEGER = "Must be an integer of at least 1"
RATE = "Must be a number of at least 0"
STEPS = "Must be a number of steps, at least 0"


def constructing(
    name: str, value: Any, remedy: str, error: type = ValueError, **other: Any
) -> Case:
    def act(parameters: Any) -> None:
        PowerSGDOptimizer(parameters, **{**other, name: value})

    return invalid(name, value, remedy, act, error)


def contradicting(remedy: str, given: str, **options: Any) -> Case:
    return Case(
        str(options), lambda ps: PowerSGDOptimizer(ps, **options), ValueError, given, remedy
    )


CONSTRUCTION = [
    *(constructing("rank", bad, INTEGER) for bad in (0, -1, 2.5, "4", None, True, math.inf)),
    *(constructing("min_compression_rate", bad, RATE) for bad in (-0.5, math.nan, "1", None)),
    *(constructing("momentum_form", bad, "Must be 'paper' or 'sgd'") for bad in ("SGD", None, 1)),
    *(constructing("start_compressing_at", bad, STEPS) for bad in (-1, 1.5, "10", None, True)),
    *(
        constructing("nonfinite", bad, "Must be 'raise' or 'skip'")
        for bad in ("ignore", True, None)
    ),
    *(constructing("seed", bad, "Must be an integer, at least 0") for bad in (-1, "0", None, 1.5)),
    *(constructing("warm_start", bad, "Must be a bool") for bad in ("yes", 1, None)),
    *(constructing("error_feedback", bad, "Must be a bool") for bad in ("yes", 1, None)),
    constructing("compile", "yes", "Must be a bool"),
    *(constructing("check_every", bad, STEPS) for bad in (-1, 2.5, "10", None)),
    *(
        constructing("max_grad_norm", bad, "Must be a positive number, math.inf")
        for bad in (0.0, -1.0, math.nan, -math.inf, "1")
    ),
    contradicting("Pass momentum_form='sgd'", "nesterov=True", nesterov=True, momentum=0.9),
    contradicting("Pass momentum_form='sgd'", "dampening=0.5", dampening=0.5, momentum=0.9),
    contradicting("Pass momentum_form='sgd'", "fused=True", fused=True),
]


@pytest.mark.parametrize("case", ids(CONSTRUCTION))
def test_construction(case: Case) -> None:
    p = a_parameter()
    case.check([p])
    case.check([{"params": [p]}])
    assert torch.equal(p, a_parameter())


def setting(name: str, value: Any, remedy: str, error: type = ValueError) -> Case:
    """Another value in a group, and a step."""

    def act(run: Run) -> None:
        run.optimizer.param_groups[0][name] = value
        run.step()

    return invalid(name, value, remedy, act, error)


SETTINGS = [
    *(setting("rank", bad, INTEGER) for bad in (0, 2.0, "2", None)),
    *(setting("min_compression_rate", bad, RATE) for bad in (-1.0, math.nan, None)),
    *(setting(name, None, "Must be a number", TypeError)
      for name in ("lr", "momentum", "weight_decay")),
    *(setting(name, bad, "Must be finite")
      for name in ("lr", "momentum", "weight_decay") for bad in (math.nan, math.inf)),
    setting("momentum_form", "torch", "Must be 'paper' or 'sgd'"),
    setting("nonfinite", "ignore", "Must be 'raise' or 'skip'"),
    setting("error_feedback", 0, "Must be a bool"),
    setting("start_compressing_at", -3, STEPS),
    setting("seed", -1, "Must be an integer, at least 0"),
    *(setting("step", bad, STEPS) for bad in (None, "3", -1, 1.5)),
    setting("check_every", -1, STEPS),
    setting("max_grad_norm", 0, "Must be a positive number, math.inf"),
]  # fmt: skip


@pytest.mark.parametrize("case", ids(SETTINGS))
def test_settings(case: Case) -> None:
    run = Run()
    good = dict(run.optimizer.param_groups[0])
    case.check(run)
    run.optimizer.param_groups[0].update(good)
    run.assert_unchanged()
    run.assert_goes_on()


def adding(name: str, value: Any, given: str, remedy: str) -> Case:
    """A group of settings that do not go."""

    def act(run: Run) -> None:
        run.optimizer.add_param_group({"params": [a_parameter()], name: value})

    return Case(f"{name}={value!r}", act, ValueError, given, remedy)


WHOLE = "must be the same in every group; pass it to the constructor"
GROUPS = [
    adding("rank", 0, "Invalid rank: 0", INTEGER),
    adding("min_compression_rate", -1, "Invalid min_compression_rate: -1", RATE),
    adding("momentum_form", "torch", "Invalid momentum_form: 'torch'", "Must be 'paper' or 'sgd'"),
    adding("nesterov", True, "nesterov=True", "Pass momentum_form='sgd'"),
    adding("seed", 5, "Invalid seed: [11, 5]", WHOLE),
    adding("warm_start", False, "Invalid warm_start: [True, False]", WHOLE),
    adding("error_feedback", False, "Invalid error_feedback: [True, False]", WHOLE),
    adding("nonfinite", "skip", "Invalid nonfinite: ['raise', 'skip']", WHOLE),
    adding("start_compressing_at", 5, "Invalid start_compressing_at: [0, 5]", WHOLE),
    adding("step", 7, "Invalid step: [2, 7]", WHOLE),
]


@pytest.mark.parametrize("case", ids(GROUPS))
def test_groups(case: Case) -> None:
    run = Run()
    case.check(run)
    assert len(run.optimizer.param_groups) == 1
    run.assert_unchanged()
    run.assert_goes_on()


def with_gradient(value: float) -> Any:
    def act(run: Run) -> None:
        set_gradients(run.workers, run.scenario.gradients(2))
        parameters_of(run.optimizer)[2].grad[3, 1] = value
        run.optimizer.step()

    return act


def replacing(name: str, value: Any) -> Any:
    """Another tensor in the state of the first parameter, and a step; then the one before."""

    def act(run: Run) -> None:
        state = run.optimizer.state[parameters_of(run.optimizer)[0]]
        good, state[name] = state[name], value
        try:
            run.step()
        finally:
            state[name] = good

    return act


def fits(name: str, given: list[int], wanted: list[int]) -> tuple[str, str]:
    return f"Invalid {name} of parameter 0: its shape is {given}", f"must be {wanted}"


CALLS = [
    Case("a NaN gradient", with_gradient(math.nan), NonFiniteGradientError,
         "on worker 0 the gradient of parameter 2 is NaN or infinite", "pass nonfinite='skip'"),
    Case("an infinite gradient", with_gradient(-math.inf), NonFiniteGradientError,
         "on worker 0 the gradient of parameter 2 is NaN or infinite", "Look for the cause"),
    Case("an error of another shape", replacing("error", torch.zeros(10, 12)), ValueError,
         *fits("error", [10, 12], [12, 10])),
    Case("a momentum of another shape", replacing("momentum_buffer", torch.zeros(12)), ValueError,
         *fits("momentum_buffer", [12], [12, 10])),
    Case("a q of another shape", replacing("q", torch.zeros(9, 2)), ValueError,
         *fits("q", [9, 2], [10, 2])),
    Case("a negative weight", lambda run: setattr(run.optimizer, "weight", -1.0), ValueError,
         "Invalid weight: -1.0", "Must be a finite number of at least 0"),
    Case("Adam in place of SGD",
         lambda run: PowerSGDOptimizer.from_sgd(torch.optim.Adam([a_parameter()])), TypeError,
         "Invalid sgd: Adam", "Must be a torch.optim.SGD"),
    Case("a bad option in place of SGD",
         lambda run: PowerSGDOptimizer.from_sgd(torch.optim.SGD([a_parameter()]), rank=0),
         ValueError, "Invalid rank: 0", INTEGER),
    Case("a compressor of rank 0",
         lambda run: ErrorFeedbackSGD([a_parameter()], compressor=PowerSGD(rank=0)), ValueError,
         "Invalid rank: 0", INTEGER),
]  # fmt: skip


@pytest.mark.parametrize("case", ids(CALLS))
def test_calls(case: Case) -> None:
    run = Run()
    case.check(run)
    run.assert_unchanged()
    run.assert_goes_on()


def test_a_parameter_of_another_shape() -> None:
    run = Run()
    p = parameters_of(run.optimizer)[0]
    good, p.data = p.data, torch.zeros(10, 12)
    p.grad = None
    with pytest.raises(ValueError, match=r"parameter 0: its shape is \[12, 10\] and must be"):
        run.optimizer.step()
    p.data = good
    run.assert_unchanged()
    run.assert_goes_on()


def test_a_step_that_is_skipped_is_no_error() -> None:
    run = Run(nonfinite="skip")
    step_with(run.workers, [[torch.full_like(p, math.nan) for p in parameters_of(run.optimizer)]])
    run.assert_unchanged()
    run.assert_goes_on()
