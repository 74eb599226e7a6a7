"""What else one worker may do wrong: with tensors, calls and checkpoints."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from efsgd import ErrorFeedbackSGD, PowerSGD, PowerSGDOptimizer, TopK
from efsgd.checkpoint import consolidated_state_dict
from tests.optimizers.misuse import Case, Run, a_parameter, invalid, usual
from tests.optimizers.misuse.settings import FORM, INTEGER, WHOLE
from tests.simulation import make_workers, parameters_of, step_with

# ---- tensors of one worker: an edit before a step -----------------------------------------------


class Unreadable(Tensor):
    """A gradient that cannot be added to anything."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.add, torch._foreach_copy_):  # of one tensor, or of several
            raise NotImplementedError("unreadable: do not add it")
        return super().__torch_function__(func, types, args, kwargs)


def before_a_step(
    name: str, edit: Callable[[PowerSGDOptimizer], object], error: type, given: str, remedy: str
) -> Case:
    return Case(name, lambda run: run.step_after(edit), error, given, remedy)


def of_other_shape(optimizer: PowerSGDOptimizer) -> None:
    p = parameters_of(optimizer)[0]
    p.grad, p.data = None, torch.zeros(10, 12)


def unreadable(optimizer: PowerSGDOptimizer) -> None:
    p = parameters_of(optimizer)[0]
    p.grad = Unreadable(p.grad)


def without(name: str) -> Case:
    """A setting that is gone."""
    return before_a_step(f"without {name}", lambda o: o.param_groups[0].pop(name), ValueError,
                         name, "parameter group")  # fmt: skip


def fits(name: str, given: list[int], wanted: list[int]) -> tuple[type[Exception], str, str]:
    return ValueError, f"Invalid {name} of parameter 0: its shape is {given}", f"must be {wanted}"


#: State that does not fit, in the optimizer and in its checkpoint.
STATE: list[tuple[str, Any, type[Exception], str, str]] = [
    ("error", torch.zeros(10, 12), *fits("error", [10, 12], [12, 10])),
    ("error", torch.zeros(12), *fits("error", [12], [12, 10])),
    ("momentum_buffer", torch.zeros(12), *fits("momentum_buffer", [12], [12, 10])),
    ("momentum_buffer", torch.zeros(10, 12), *fits("momentum_buffer", [10, 12], [12, 10])),
    ("q", torch.zeros(9, 2), *fits("q", [9, 2], [10, 2])),
    ("momentum_started", torch.ones(3), *fits("momentum_started", [3], [])),
    *(
        (name, bad, TypeError, f"Invalid {name} of parameter 0: {bad!r}", "Must be a tensor")
        for name in ("error", "momentum_buffer", "q", "momentum_started")
        for bad in ("zeros", [1, 2], 3.0)
    ),
]


def state_case(name: str, value: Any, *expected: Any) -> Case:
    def edit(optimizer: PowerSGDOptimizer) -> None:
        optimizer.state[parameters_of(optimizer)[0]][name] = value

    kind = list(value.shape) if isinstance(value, Tensor) else repr(value)
    return before_a_step(f"{name} of {kind}", edit, *expected)


TENSORS = [
    *(state_case(*row) for row in STATE),
    *(without(name) for name in ("rank", "lr", "momentum_form")),
    before_a_step("a parameter of another shape", of_other_shape, ValueError,
                  "parameter 0: its shape is [12, 10]", "must be [10, 12]"),
    before_a_step("a gradient that cannot be read", unreadable, NotImplementedError,
                  "unreadable", "do not add it"),
    before_a_step("settings of a group though it has others for each parameter",
                  lambda o: o.param_groups[0].update(per_parameter={"rank": (1, 1, 1)}, rank=0),
                  ValueError, "Invalid rank: 0.", INTEGER),
]  # fmt: skip

# ---- calls --------------------------------------------------------------------------------------


def with_compressor(value: Any) -> Callable[[Any], object]:
    return lambda _: ErrorFeedbackSGD([a_parameter()], compressor=value)


def excluding(_: Run) -> None:
    groups = [{"params": [a_parameter(), a_parameter()], "per_parameter": {"rank": (None, 2)}}]
    ErrorFeedbackSGD(groups, lr=0.1, compressor=TopK(density=0.1))


def steps_of_groups(_: Run) -> None:
    optimizer = PowerSGDOptimizer([{"params": [a_parameter()]} for _ in range(2)], lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][1]["step"] = 5
    try:
        optimizer.load_state_dict(saved)
    finally:
        assert [group["step"] for group in optimizer.param_groups] == [0, 0]


CALLS = [
    *(invalid("weight", bad, "Must be",
              lambda run, bad=bad: setattr(run.optimizer, "weight", bad), error)
      for bad, error in ((-1.0, ValueError), (math.nan, ValueError), ("1", TypeError))),
    *(invalid("source", bad, "Must be an integer from 0 to 0",
              lambda run, bad=bad: run.optimizer.broadcast_parameters(bad), ValueError)
      for bad in (5, -1, "0")),
    invalid("worker", 2, "Must be", lambda run: next(run.optimizer.exchange(2, 2)), ValueError),
    invalid("world_size", 0, "Must be", lambda run: next(run.optimizer.exchange(0, 0)), ValueError),
    *(invalid("compressor", bad, "Must be", with_compressor(bad), TypeError)
      for bad in ("powersgd", PowerSGD)),
    Case("a compressor of rank 0", lambda _: ErrorFeedbackSGD([a_parameter()],
         compressor=PowerSGD(rank=0)), ValueError, "Invalid rank: 0", INTEGER),
    Case("a rank for a compressor that has a density", excluding, ValueError,
         "Invalid density and rank: 0.1 and 2", "set the other to None"),
    Case("steps that differ between groups", steps_of_groups, ValueError, "Invalid step: [0, 5]",
         WHOLE),
    Case("Adam in place of SGD",
         lambda _: PowerSGDOptimizer.from_sgd(torch.optim.Adam([a_parameter()])), TypeError,
         "Invalid sgd: Adam", "Must be a torch.optim.SGD"),
    Case("a bad option in place of SGD",
         lambda _: PowerSGDOptimizer.from_sgd(torch.optim.SGD([a_parameter()]), rank=0),
         ValueError, "Invalid rank: 0", INTEGER),
    Case("consolidating an SGD",
         lambda _: consolidated_state_dict(torch.optim.SGD([a_parameter()])), TypeError,
         "Invalid optimizer: SGD", "Must be"),
]  # fmt: skip

# ---- checkpoints --------------------------------------------------------------------------------


def loading(
    name: str, edit: Callable[[dict[str, Any]], object], error: type, given: str, remedy: str
) -> Case:
    """A good state_dict, edited or replaced, and loaded."""

    def act(run: Run) -> None:
        saved = copy.deepcopy(run.optimizer.state_dict())
        replaced = edit(saved)
        run.optimizer.load_state_dict(saved if replaced is None else replaced)

    return Case(f"loading {name}", act, error, given, remedy)


def lacking(name: str, edit: Callable[[dict[str, Any]], object], given: str) -> Case:
    return loading(name, edit, ValueError, given, "Must be what state_dict() returned")


def loading_state(name: str, value: Any, *expected: Any) -> Case:
    kind = list(value.shape) if isinstance(value, Tensor) else repr(value)
    return loading(f"{name} of {kind}", lambda saved: saved["state"][0].update({name: value}),
                   *expected)  # fmt: skip


def of_another_model(_: dict[str, Any]) -> dict[str, Any]:
    """As many parameters, of other shapes."""
    shapes = (6, 5), (7,), (6, 5)
    other = make_workers([torch.zeros(shape) for shape in shapes], 1, momentum=0.9)
    step_with(other, [[torch.ones(shape) for shape in shapes]])
    return other[0].state_dict()


def of_other_optimizer(cls: type, **options: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The state_dict that another optimizer has of the same parameters."""

    def edit(_: dict[str, Any]) -> dict[str, Any]:
        other = cls(usual(), **options)
        for p in parameters_of(other):
            p.grad = torch.ones_like(p)
        other.step()
        return copy.deepcopy(other.state_dict())

    return edit


def late(saved: dict[str, Any]) -> None:
    """What can be seen to be wrong is seen before the first tensor is replaced."""
    saved["state"][0]["momentum_buffer"] += 1
    saved["state"][2]["q"] = torch.zeros(9, 2)


CHECKPOINTS = [
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
    loading("SGD with nesterov",
            of_other_optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
            ValueError, "nesterov=True", FORM),
    *(loading_state(*row) for row in STATE),
    loading("another model", of_another_model, *fits("momentum_buffer", [6, 5], [12, 10])),
    loading("what is wrong late", late, ValueError, "Invalid q of parameter 2", "must be [10, 2]"),
]  # fmt: skip
