"""What users may do wrong with rank schedulers: the message has what was given, and the remedy."""

import math
import re
from typing import Any

import pytest
import torch

from efsgd import ErrorFeedbackSGD, GradientAverager, PowerSGD, PowerSGDOptimizer, TopK
from efsgd.rank import Accordion, RankScheduler
from tests.optimizers.misuse import a_parameter
from tests.rank.rank_runs import individual

FINITE = "Must be a finite number of at least 0."
COUNT = "Must be an integer of at least 1"
WRONG = [
    *(
        ({name: value}, f"Invalid {name}: {value!r}. {FINITE}")
        for name in ("low", "high", "threshold", "lr_fall")
        for value in (-1, math.inf, math.nan, "4", None, True)
    ),
    *(
        ({name: value}, f"Invalid {name}: {value!r}. {COUNT}")
        for name in ("interval", "sketch")
        for value in (0, -1, 1.0, math.inf, "4", True)
    ),
    ({"interval": None}, f"Invalid interval: None. {COUNT}"),
    ({"scope": "all"}, "Invalid scope: 'all'. Must be one of ['layer', 'model']"),
    ({"gradients": "own"}, "Invalid gradients: 'own'. Must be one of ['mean', 'worker 0']"),
    (
        {"low": 4, "high": 1},
        "Invalid low and high: 4 and 1. Must be in this order: low is for windows in which little "
        "changes, and must not exceed high.",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=str)
def test_an_argument_of_accordion_that_is_out_of_range_is_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Accordion(**{"low": 1, "high": 4, **arguments})


def powersgd(**options: Any) -> PowerSGDOptimizer:
    return PowerSGDOptimizer([a_parameter()], lr=0.1, **options)


def averager() -> GradientAverager:
    return GradientAverager([a_parameter()])


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([a_parameter()], lr=0.1)


def top_k() -> ErrorFeedbackSGD:
    return ErrorFeedbackSGD([a_parameter()], lr=0.1, compressor=TopK(rank=2))


GOOD = Accordion(1, 4)
# The optimizer, the policy, whose learning rates count, what is raised, and its words.
SCHEDULERS: list[tuple[Any, Any, Any, type[Exception], str]] = [
    (sgd, GOOD, None, TypeError, "Invalid optimizer: SGD. Must be one of this package, for exa"),
    (powersgd, 4, None, TypeError, "Invalid policy: 4. Must be an efsgd.rank.RankPolicy, for ex"),
    (powersgd, Accordion, None, TypeError, "Invalid policy: <class .* Must be an efsgd.rank.Ra"),
    (
        averager,
        GOOD,
        lambda: torch.optim.lr_scheduler.ConstantLR(powersgd()),
        TypeError,
        "Invalid lr_of: ConstantLR. Must be a torch.optim.Optimizer of the same parameters, or No",
    ),
    (
        averager,
        GOOD,
        sgd,
        ValueError,
        "Invalid lr_of: SGD. Must have the parameters that are compressed",
    ),
    (
        powersgd,
        Accordion(1, 4, setting="density"),
        None,
        ValueError,
        r"Invalid setting: 'density'. .* one of \['min_compression_rate', 'rank'",
    ),
    (
        powersgd,
        Accordion(0, 1, setting="seed"),
        None,
        ValueError,
        "Invalid setting: 'seed'. Must be a setting of PowerSGD that each parameter may have for",
    ),
    (powersgd, Accordion(0, 4), None, ValueError, f"Invalid rank: 0. {COUNT}"),
    (powersgd, Accordion(1, 2.5), None, ValueError, f"Invalid rank: 2.5. {COUNT}"),
    (
        top_k,
        Accordion(0.1, 0.5, setting="density"),
        None,
        ValueError,
        "Invalid density and rank: 0.1 and 2. .* set the other to None.",
    ),
    (
        lambda: powersgd(min_compression_rate=math.inf),
        GOOD,
        None,
        ValueError,
        r"Invalid rank values: \[1, 4\]. .* there is nothing to decide on.",
    ),
]


@pytest.mark.parametrize(
    ("make", "policy", "lr_of", "kind", "words"), SCHEDULERS, ids=[case[-1] for case in SCHEDULERS]
)
def test_what_does_not_go_together_is_refused(
    make: Any, policy: Any, lr_of: Any, kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        RankScheduler(make(), policy, lr_of=lr_of and lr_of())


def test_an_optimizer_is_as_it_was_where_a_scheduler_is_refused() -> None:
    optimizer = ErrorFeedbackSGD([a_parameter()], lr=0.1, compressor=PowerSGD(rank=3))
    for policy in (Accordion(0, 4), Accordion(1, 4, setting="density")):
        with pytest.raises(ValueError):
            RankScheduler(optimizer, policy)
    with pytest.raises(ValueError):
        RankScheduler(optimizer, Accordion(1, 4), lr_of=powersgd())
    assert individual(optimizer) == [None]
    assert optimizer.param_groups[0]["per_parameter"] is None
    assert optimizer.engine.watchers == []
