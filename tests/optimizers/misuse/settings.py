"""Settings that make no sense: each is tried in every way in which a setting can be given."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from efsgd import PowerSGDOptimizer
from tests.optimizers.misuse import Case, Run, a_parameter

INTEGER = "Must be an integer of at least 1"
RATE = "Must be a number of at least 0"
STEPS = "Must be a number of steps, at least 0"
FORM = "Pass momentum_form='sgd'"
WHOLE = "must be the same in every group: set it in all of them"
KINDS = "Must be None, or a dict from names of settings to a value for each parameter"
NAMES = "Must be one of ['batch_dims', 'min_compression_rate', 'rank']"
LISTS = "Must be a list or a tuple, with a value or None for each parameter of the group"
COUNT = "Must have one, or None, for each"


@dataclass(frozen=True)
class Setting:
    """A value that some setting must not have."""

    name: str
    value: Any
    remedy: str
    error: type[Exception] = ValueError
    given: str = ""

    def case(self, way: Callable[[str, Any], Callable[[Run], object]]) -> Case:
        """One way to give it."""
        given = self.given or f"Invalid {self.name}: {self.value!r}"
        name = f"{way.__name__} {self.name}={self.value!r}"
        return Case(name, way(self.name, self.value), self.error, given, self.remedy)


# ---- ways to give a setting ---------------------------------------------------------------------


def three() -> list[torch.Tensor]:
    return [a_parameter() for _ in range(3)]


def constructing(name: str, value: Any) -> Callable[[Run], object]:
    """As an argument."""
    return lambda _: PowerSGDOptimizer([a_parameter()], **{"momentum": 0.9, name: value})


def constructing_groups(name: str, value: Any) -> Callable[[Run], object]:
    """In a group at construction, which has three parameters."""
    return lambda _: PowerSGDOptimizer([{"params": three(), name: value}], momentum=0.9)


def adding(name: str, value: Any) -> Callable[[Run], object]:
    """In a group that is added later."""
    return lambda run: run.optimizer.add_param_group({"params": three(), name: value})


def changing(name: str, value: Any) -> Callable[[Run], object]:
    """In a group, between steps."""
    return lambda run: run.step_after(lambda o: o.param_groups[0].update({name: value}))


def loading(name: str, value: Any) -> Callable[[Run], object]:
    """From a checkpoint."""

    def act(run: Run) -> None:
        saved = copy.deepcopy(run.optimizer.state_dict())
        saved["param_groups"][0][name] = value
        run.optimizer.load_state_dict(saved)

    return act


# ---- the table ----------------------------------------------------------------------------------


def each(
    name: str, values: tuple[Any, ...], remedy: str, error: type = ValueError
) -> list[Setting]:
    return [Setting(name, value, remedy, error) for value in values]


def numbers(*names: str) -> list[Setting]:
    return [
        setting
        for name in names
        for setting in [
            *each(name, ("0.1", None), "Must be a number", TypeError),
            *each(name, (math.nan, math.inf), "Must be finite"),
        ]
    ]


#: In groups and as arguments.
EVERYWHERE = [
    *each("rank", (0, -1, 2.5, 2.0, "4", None, True, math.inf), INTEGER),
    *each("min_compression_rate", (-0.5, math.nan, "1", None), RATE),
    *each("batch_dims", (-1, 0.5, "1", None, True), "Must be an integer of at least 0"),
    *each("momentum_form", ("SGD", "torch", None, 1), "Must be 'paper' or 'sgd'"),
    Setting("nesterov", True, FORM, given="nesterov=True"),
    Setting("dampening", 0.5, FORM, given="dampening=0.5"),
    Setting("fused", True, FORM, given="fused=True"),
    *numbers("lr", "momentum", "weight_decay"),
]
#: Of the optimizer as a whole: groups that are added must agree with the others.
OF_THE_WHOLE = [
    *each("start_compressing_at", (-1, 1.5, "10", None, True), STEPS),
    *each("nonfinite", ("ignore", True, None), "Must be 'raise' or 'skip'"),
    *each("seed", (-1, "0", None, 1.5), "Must be an integer of at least 0"),
    *each("warm_start", ("yes", 1, None), "Must be a bool"),
    *each("error_feedback", ("yes", 1, 0, None), "Must be a bool"),
    *each("check_every", (-1, 2.5, "10", None, True), STEPS),
    *each("max_grad_norm", (0, 0.0, -1.0, math.nan, -math.inf, "1"),
          "Must be a positive number, math.inf"),
]  # fmt: skip
#: No arguments: the optimizer counts, and a state_dict says what was counted.
OF_GROUPS = each("step", (None, "3", -1, 1.5), STEPS)
#: No settings of groups.
ARGUMENTS = [
    *each("compile", ("yes",), "Must be a bool"),
    *each("process_group", ("world",), "Must be", TypeError),
]
ADDED = [
    Setting("seed", 5, WHOLE, given="Invalid seed: [11, 5]"),
    Setting("warm_start", False, WHOLE, given="Invalid warm_start: [True, False]"),
    Setting("error_feedback", False, WHOLE, given="Invalid error_feedback: [True, False]"),
    Setting("nonfinite", "skip", WHOLE, given="Invalid nonfinite: ['raise', 'skip']"),
    Setting("start_compressing_at", 5, WHOLE, given="Invalid start_compressing_at: [0, 5]"),
]


def per_parameter(
    value: Any, given: str, remedy: str, error: type[Exception] = ValueError
) -> Setting:
    return Setting("per_parameter", value, remedy, error, given)


PER_PARAMETER = [
    per_parameter([1, 2, 3], "Invalid per_parameter: [1, 2, 3]", KINDS, TypeError),
    per_parameter("rank", "Invalid per_parameter: 'rank'", KINDS, TypeError),
    per_parameter(3, "Invalid per_parameter: 3", KINDS, TypeError),
    per_parameter({"density": (0.1,) * 3}, "'density' is no setting", NAMES),
    per_parameter({"lr": (0.1,) * 3}, "'lr' is no setting", NAMES),
    per_parameter({"seed": (1, 2, 3)}, "'seed' is no setting", NAMES),
    per_parameter({0: (1, 2, 3)}, "0 is no setting", NAMES),
    per_parameter({"rank": "123"}, "'rank' has '123'", LISTS, TypeError),
    per_parameter({"rank": b"123"}, "'rank' has b'123'", LISTS, TypeError),
    per_parameter({"rank": 3}, "'rank' has 3", LISTS, TypeError),
    per_parameter({"rank": {0: 3}}, "'rank' has {0: 3}", LISTS, TypeError),
    per_parameter({"rank": torch.tensor([1, 2, 3])}, "'rank' has tensor(", LISTS, TypeError),
    per_parameter({"rank": (1, 2)}, "'rank' has 2 values for 3 parameters", COUNT),
    per_parameter({"rank": (1,) * 4}, "'rank' has 4 values for 3 parameters", COUNT),
    per_parameter({"rank": ()}, "'rank' has 0 values for 3 parameters", COUNT),
    per_parameter({"rank": (1, 0, 1)}, "Invalid rank: 0.", INTEGER),
    per_parameter({"rank": (1, 1, 1.0)}, "Invalid rank: 1.0.", INTEGER),
    per_parameter({"rank": (1, True, 1)}, "Invalid rank: True.", INTEGER),
    per_parameter({"rank": (1, "2", 1)}, "Invalid rank: '2'.",
                  "That is what per_parameter has for parameter 1 of the group"),
    per_parameter({"rank": (1, 1, [2])}, "Invalid rank: [2].", INTEGER),
    per_parameter({"min_compression_rate": (None, None, -1.0)},
                  "Invalid min_compression_rate: -1.0.", "for parameter 2 of the group"),
    per_parameter({"batch_dims": (0, -1, 0)}, "Invalid batch_dims: -1.",
                  "That is what per_parameter has for parameter 1 of the group"),
]  # fmt: skip

_TABLE: list[tuple[list[Setting], list[Callable[[str, Any], Callable[[Run], object]]]]] = [
    (EVERYWHERE, [constructing, constructing_groups, adding, changing, loading]),
    (numbers("dampening"), [constructing, constructing_groups, adding, loading]),
    (OF_THE_WHOLE, [constructing, constructing_groups, changing, loading]),
    (OF_GROUPS, [loading]),
    (ARGUMENTS, [constructing]),
    (ADDED, [adding]),
    (PER_PARAMETER, [constructing_groups, adding, changing, loading]),
]
SETTINGS = [row.case(way) for rows, ways in _TABLE for row in rows for way in ways]
