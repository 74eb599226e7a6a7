"""Misuse that Python or torch would answer in words of their own, far from where it happened."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from efsgd import CollectiveError, ErrorFeedbackSGD, PowerSGD, PowerSGDOptimizer
from efsgd.checkpoint import consolidated_state_dict
from efsgd.testing import step_together
from tests.optimizers.misuse import Case, Run, a_parameter, ids, invalid
from tests.optimizers.test_misuse import CALLS, replacing, setting
from tests.optimizers.test_misuse import constructing as constructing_with
from tests.optimizers.test_misuse_of_checkpoints import fits, loading
from tests.optimizers.test_misuse_of_checkpoints import replacing as loading_state
from tests.optimizers.test_misuse_of_checkpoints import setting as loading_setting
from tests.simulation import a_run, bits, parameters_of, set_gradients, snapshot, step_with

NUMBERS = ("lr", "momentum", "weight_decay", "dampening")
NUMBER = "Must be a number"


def with_compressor(value: Any) -> None:
    ErrorFeedbackSGD([a_parameter()], compressor=value)


CONSTRUCTION = [
    *(constructing_with(name, bad, NUMBER, TypeError, momentum_form="sgd")
      for name in NUMBERS for bad in ("0.1", None)),
    constructing_with("process_group", "world", "Must be", TypeError),
    invalid("compressor", "powersgd", "Must be", lambda _: with_compressor("powersgd"), TypeError),
    invalid("compressor", PowerSGD, "Must be", lambda _: with_compressor(PowerSGD), TypeError),
]  # fmt: skip


@pytest.mark.parametrize("case", ids(CONSTRUCTION))
def test_construction(case: Case) -> None:
    p = a_parameter()
    case.check([p])
    assert torch.equal(p, a_parameter())


def without(name: str) -> Case:
    def act(run: Run) -> None:
        del run.optimizer.param_groups[0][name]
        run.step()

    return Case(f"without {name}", act, ValueError, name, "parameter group")


SETTINGS = [
    *(setting(name, "0.1", NUMBER, TypeError) for name in ("lr", "momentum", "weight_decay")),
    *(without(name) for name in ("rank", "lr", "momentum_form", "step")),
]


@pytest.mark.parametrize("case", ids(SETTINGS))
def test_settings(case: Case) -> None:
    run = Run()
    good = dict(run.optimizer.param_groups[0])
    case.check(run)
    run.optimizer.param_groups[0].update(good)
    run.assert_unchanged()
    run.assert_goes_on()


TENSOR = "Must be a tensor"
MISTAKEN_CALLS = [
    *(Case(f"state {name} of {bad!r}", replacing(name, bad), TypeError,
           f"Invalid {name} of parameter 0: {bad!r}", TENSOR)
      for name, bad in (("error", "zeros"), ("momentum_buffer", "zeros"), ("q", [1, 2]))),
    *(invalid("source", bad, "Must be a worker's number",
              lambda run, bad=bad: run.optimizer.broadcast_parameters(bad), ValueError)
      for bad in (5, -1, "0")),
    invalid("worker", 2, "Must be", lambda run: next(run.optimizer.exchange(2, 2)), ValueError),
    invalid("world_size", 0, "Must be", lambda run: next(run.optimizer.exchange(0, 0)), ValueError),
    invalid("weight", "1", "Must be a number",
            lambda run: setattr(run.optimizer, "weight", "1"), TypeError),
    Case("consolidating an SGD",
         lambda run: consolidated_state_dict(torch.optim.SGD([a_parameter()])), TypeError,
         "Invalid optimizer: SGD", "Must be"),
]  # fmt: skip


@pytest.mark.parametrize("case", ids(MISTAKEN_CALLS))
def test_calls(case: Case) -> None:
    run = Run()
    case.check(run)
    run.assert_unchanged()
    run.assert_goes_on()


def of_other_optimizer(cls: type, **options: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The state_dict that another optimizer has of the same parameters."""

    def edit(_: dict[str, Any]) -> dict[str, Any]:
        parameters = [p.detach().clone().requires_grad_() for p in parameters_of(a_run(1)[0][0])]
        other = cls(parameters, **options)
        for p in parameters:
            p.grad = torch.ones_like(p)
        other.step()
        return copy.deepcopy(other.state_dict())

    return edit


def lacking(name: str, edit: Callable[[dict[str, Any]], object], given: str) -> Case:
    return loading(name, edit, ValueError, given, "Must be what state_dict() returned")


CHECKPOINTS = [
    *(loading_setting(name, bad, NUMBER, TypeError)
      for name in ("lr", "momentum", "weight_decay") for bad in ("0.1", None)),
    *(loading_setting(name, math.nan, "Must be finite") for name in ("lr", "momentum")),
    loading("a list for a dict", lambda _: [], TypeError, "Invalid state_dict", "Must be"),
    loading("a path for a dict", lambda _: "checkpoint.pt", TypeError,
            "Invalid state_dict: 'checkpoint.pt'", "Must be"),
    lacking("an empty dict", lambda _: {}, "'state'"),
    lacking("no state", lambda saved: saved.pop("state") and None, "'state'"),
    lacking("no groups", lambda saved: saved.pop("param_groups") and None, "'param_groups'"),
    lacking("no params", lambda saved: saved["param_groups"][0].pop("params") and None, "'params'"),
    lacking("a whole checkpoint", lambda saved: {"model": {}, "optimizer": saved}, "optimizer"),
    lacking("a model's", lambda _: torch.nn.Linear(3, 3).state_dict(), "weight"),
    lacking("a list of states", lambda saved: saved.__setitem__("state", []), "state"),
    lacking("a number for a state", lambda saved: saved["state"].__setitem__(0, 5), "5"),
    *(loading(cls.__name__, of_other_optimizer(cls), ValueError, word, "torch.optim.SGD")
      for cls, word in ((torch.optim.Adam, "exp_avg"), (torch.optim.AdamW, "exp_avg"),
                        (torch.optim.Adagrad, "sum"), (torch.optim.RMSprop, "square_avg"))),
    *(loading_state(name, bad, f"Invalid {name} of parameter 0: {bad!r}", TENSOR, TypeError)
      for name, bad in (("momentum_buffer", [1, 2]), ("error", "zeros"), ("q", 3.0),
                        ("momentum_started", 2))),
    loading_state("q", torch.zeros(9, 2), *fits("q", [9, 2], [10, 2])),
    loading_state("momentum_started", torch.ones(3), *fits("momentum_started", [3], [])),
]  # fmt: skip


@pytest.mark.parametrize("case", ids(CHECKPOINTS))
def test_loading(case: Case) -> None:
    run = Run()
    case.check(run)
    run.assert_unchanged()
    run.assert_goes_on()


def test_a_load_that_fails_late_has_changed_nothing() -> None:
    """What can be seen to be wrong is seen before the first tensor is replaced."""
    run = Run()
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["state"][0]["momentum_buffer"] += 1
    saved["state"][2]["q"] = torch.zeros(9, 2)
    with pytest.raises(ValueError, match="Invalid q of parameter 2"):
        run.optimizer.load_state_dict(saved)
    run.assert_unchanged()


OBSTACLES: dict[str, Callable[[PowerSGDOptimizer], object]] = {
    "rank": lambda optimizer: optimizer.param_groups[0].__setitem__("rank", 0),
    "lr": lambda optimizer: optimizer.param_groups[0].__setitem__("lr", None),
    "momentum": lambda optimizer: optimizer.state[parameters_of(optimizer)[0]].__setitem__(
        "momentum_buffer", torch.zeros(3)
    ),
    "error": lambda optimizer: optimizer.state[parameters_of(optimizer)[0]].__setitem__(
        "error", torch.zeros(3)
    ),
}


@pytest.mark.parametrize("what", OBSTACLES)
def test_what_is_wrong_on_one_worker_stops_all(what: str) -> None:
    """That worker raises its own error; the others say who could not take part, and do not wait."""
    workers, scenario = a_run(3)
    for step in range(2):
        step_with(workers, scenario.gradients(step))
    set_gradients(workers, scenario.gradients(2))
    OBSTACLES[what](workers[1])
    before = bits(snapshot([workers[0], workers[2]]))
    with pytest.raises(CollectiveError, match="worker 1") as caught:
        step_together(workers)
    assert caught.value.__notes__[1] == f"worker 2: CollectiveError: {caught.value}"
    assert caught.value.__notes__[0].startswith(("worker 1: ValueError", "worker 1: TypeError"))
    assert bits(snapshot([workers[0], workers[2]])) == before


def test_cases_are_told_apart() -> None:
    """No case hides another of the same name."""
    for table in (CONSTRUCTION, SETTINGS, [*CALLS, *MISTAKEN_CALLS], CHECKPOINTS):
        names = [case.name for case in table]
        assert len(set(names)) == len(names)
