"""What `per_parameter` must not be: clear errors, early, on all workers, and nothing changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from efsgd import CollectiveError, ErrorFeedbackSGD, PowerSGDOptimizer, TopK
from tests.optimizers.misuse import Case, Run, ids
from tests.rank.rank_changes import OWN, matrices, set_own
from tests.simulation import a_run, step_with

KINDS = "Must be None, or a dict from names of settings to a value for each parameter"
NAMES = "Must be one of ['min_compression_rate', 'rank']"
LISTS = "Must be a list or a tuple, with a value or None for each parameter of the group"
COUNT = "Must have one, or None, for each"
RANK = "Must be an integer of at least 1"

MISUSES: list[tuple[str, Any, type[Exception], str, str]] = [
    ("a list", [1, 2, 3], TypeError, "Invalid per_parameter: [1, 2, 3]", KINDS),
    ("a string", "rank", TypeError, "Invalid per_parameter: 'rank'", KINDS),
    ("a number", 3, TypeError, "Invalid per_parameter: 3", KINDS),
    ("an unknown name", {"density": (0.1,) * 3}, ValueError, "'density' is no setting", NAMES),
    ("a name of the optimizer's", {"lr": (0.1,) * 3}, ValueError, "'lr' is no setting", NAMES),
    ("a shared setting", {"seed": (1, 2, 3)}, ValueError, "'seed' is no setting", NAMES),
    ("a name that is none", {0: (1, 2, 3)}, ValueError, "0 is no setting", NAMES),
    ("a string of ranks", {"rank": "123"}, TypeError, "'rank' has '123'", LISTS),
    ("bytes", {"rank": b"123"}, TypeError, "'rank' has b'123'", LISTS),
    ("a rank for all", {"rank": 3}, TypeError, "'rank' has 3", LISTS),
    ("a dict of ranks", {"rank": {0: 3}}, TypeError, "'rank' has {0: 3}", LISTS),
    ("a tensor", {"rank": torch.tensor([1, 2, 3])}, TypeError, "'rank' has tensor(", LISTS),
    ("too few", {"rank": (1, 2)}, ValueError, "'rank' has 2 values for 3 parameters", COUNT),
    ("too many", {"rank": (1,) * 4}, ValueError, "'rank' has 4 values for 3 parameters", COUNT),
    ("none", {"rank": ()}, ValueError, "'rank' has 0 values for 3 parameters", COUNT),
    ("zero", {"rank": (1, 0, 1)}, ValueError, "Invalid rank: 0.", RANK),
    ("a fraction", {"rank": (1, 1, 1.0)}, ValueError, "Invalid rank: 1.0.", RANK),
    ("a bool", {"rank": (1, True, 1)}, ValueError, "Invalid rank: True.", RANK),
    ("a string for a rank", {"rank": (1, "2", 1)}, ValueError, "Invalid rank: '2'.",
     "That is what per_parameter has for parameter 1 of the group"),
    ("a list for a rank", {"rank": (1, 1, [2])}, ValueError, "Invalid rank: [2].", RANK),
    ("a negative rate", {"min_compression_rate": (None, None, -1.0)}, ValueError,
     "Invalid min_compression_rate: -1.0.", "for parameter 2 of the group"),
]  # fmt: skip


def changing(own: Any) -> Callable[[Run], None]:
    def act(run: Run) -> None:
        run.optimizer.param_groups[0]["per_parameter"] = own
        run.step()

    return act


def loading(own: Any) -> Callable[[Run], None]:
    def act(run: Run) -> None:
        saved = copy.deepcopy(run.optimizer.state_dict())
        saved["param_groups"][0]["per_parameter"] = own
        run.optimizer.load_state_dict(saved)

    return act


def adding(own: Any) -> Callable[[Run], None]:
    return lambda run: run.optimizer.add_param_group({"params": matrices(3), "per_parameter": own})


def constructing(own: Any) -> Callable[[Run], None]:
    def act(_: Run) -> None:
        PowerSGDOptimizer([{"params": matrices(3), "per_parameter": own}])

    return act


@pytest.mark.parametrize("way", [constructing, adding, changing, loading])
@pytest.mark.parametrize(
    "case", ids([Case(name, lambda: None, *rest) for name, _, *rest in MISUSES])
)
def test_what_makes_no_sense_is_an_error_and_changes_nothing(
    case: Case, way: Callable[[Any], Callable[[Run], None]]
) -> None:
    own = next(value for name, value, *_ in MISUSES if name == case.name)
    run = Run()
    Case(case.name, way(own), case.error, case.given, case.remedy).check(run)
    run.optimizer.param_groups[0]["per_parameter"] = None
    run.assert_unchanged()


@pytest.mark.parametrize("name", ["too few", "a bool", "a list for a rank", "an unknown name"])
def test_on_one_worker_alone_it_is_an_error_on_all(name: str) -> None:
    own = next(value for each, value, *_ in MISUSES if each == name)
    run = Run(3)
    run.workers[1].param_groups[0]["per_parameter"] = own
    with pytest.raises(
        CollectiveError, match="could not take part, and say themselves why: worker 1"
    ):
        run.step()
    run.workers[1].param_groups[0]["per_parameter"] = None
    run.assert_unchanged()
    run.assert_goes_on()


def test_the_group_s_own_settings_are_checked_whatever_it_says() -> None:
    for own in ({}, {"rank": (1, 1, 1)}):
        [optimizer], scenario = a_run(1)
        optimizer.param_groups[0].update(per_parameter=own, rank=0)
        with pytest.raises(ValueError, match=r"Invalid rank: 0\."):
            step_with([optimizer], scenario.gradients(0))


def test_a_parameter_that_is_appended_to_a_group_needs_a_value() -> None:
    [optimizer], scenario = a_run(1)
    set_own([optimizer], OWN)
    step_with([optimizer], scenario.gradients(0))
    optimizer.param_groups[0]["params"].append(matrices(1)[0])
    with pytest.raises(ValueError, match="'rank' has 3 values for 4 parameters"):
        optimizer.step()
    optimizer.param_groups[0]["per_parameter"] = {"rank": (*OWN["rank"], 4)}
    optimizer.step()


def test_settings_that_exclude_each_other_are_found_for_single_parameters() -> None:
    with pytest.raises(ValueError, match=r"Invalid density and rank: 0\.1 and 2"):
        ErrorFeedbackSGD([{"params": matrices(2), "per_parameter": {"rank": (None, 2)}}], lr=0.1,
                         compressor=TopK(density=0.1))  # fmt: skip
