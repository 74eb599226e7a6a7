"""What users may do wrong with rank schedulers: the message has what was given, and the remedy."""

import math
import re
from typing import Any

import pytest
import torch

from efsgd import ErrorFeedbackSGD, GradientAverager, PowerSGD, PowerSGDOptimizer, TopK
from efsgd.rank import (
    Accordion,
    CommunicationBudget,
    LGreCo,
    Network,
    RankScheduler,
    StepTime,
)
from tests.optimizers.misuse import a_parameter
from tests.rank.rank_runs import individual

FINITE = "Must be a finite number of at least 0."
COUNT = "Must be an integer of at least 1"
ABOVE = "Must be a finite number above 0.0."
BYTES = "Must be a number of bytes above 0"
ONCE = "Must be one or more numbers, each once"
OF_ACCORDION: list[tuple[dict[str, Any], str]] = [
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


OF_L_GRECO: list[tuple[dict[str, Any], str]] = [
    *(({"reference": v}, f"Invalid value: {v!r}. {FINITE}") for v in ("4", -1, True)),
    *(
        ({name: value}, f"Invalid {name}: {value!r}. {ABOVE}")
        for name in ("shrink", "grow", "tolerance")
        for value in (0.0, math.inf, math.nan, "2")
    ),
    *(
        ({name: value}, f"Invalid {name}: {value!r}. {COUNT}")
        for name in ("observations", "interval", "iterations", "sketch")
        for value in (0, 2.0)
    ),
    ({"spectrum": "qr"}, "Invalid spectrum: 'qr'. Must be one of ['power', 'svd']."),
    ({"gradients": "all"}, "Invalid gradients: 'all'. Must be one of ['mean', 'worker 0']."),
    ({"values": [1, 2]}, "Invalid values: [1, 2]. They lack [4], which the reference may ask for"),
    ({"values": []}, "Invalid values: []. They lack [4], which the reference may ask for"),
    ({"values": [4, "8"]}, "Invalid values[1]: '8'. Must be a finite number of at least 0."),
    ({"shrink": 2.0}, "Invalid values: [8]. They lack [4], which the reference may ask for"),
    (
        {"reference": 0.1, "setting": "density"},
        "Invalid values: None. Must be given where those of the reference are no integers, as "
        "here: [0.1].",
    ),
    (
        {"reference": Accordion(1, 4), "setting": "density"},
        "Invalid setting: 'density'. The reference decides on 'rank'; make it with another "
        "setting, or leave this one out.",
    ),
]
OF_A_BUDGET: list[tuple[dict[str, Any], str]] = [
    ({}, "Invalid bytes_per_step and share_of_step: None and None. Must be one of them"),
    ({"bytes_per_step": 9, "share_of_step": 0.3}, "9 and 0.3. Must be one of them"),
    *(
        ({"bytes_per_step": value}, f"Invalid bytes_per_step: {value!r}. {BYTES}")
        for value in (0, "9", math.nan, math.inf, True)
    ),
    *(
        ({"share_of_step": v}, f"Invalid share_of_step: {v}. Must be a number above 0 and below 1")
        for v in (0.0, 1)
    ),
    *(
        ({"share_of_step": 0.3, name: value}, f"Invalid {name}: {value!r}. {COUNT}")
        for name in ("max_rank", "interval")
        for value in (0, 2.5, "9")
    ),
    *(
        ({"share_of_step": 0.3, "values": values}, f"Invalid values: {values!r}. {ONCE}")
        for values in ([], [1, 2, 1], ["1"])
    ),
    ({"share_of_step": 0.3, "setting": "density"}, "Invalid values: None. Must be a list of valu"),
]
OF_TIMES: list[tuple[dict[str, Any], str]] = [
    ({"repeats": value}, f"Invalid repeats: {value!r}. {COUNT}") for value in (0, 1.5, True)
]
OF_A_NETWORK: list[tuple[dict[str, Any], str]] = [
    ({name: value}, f"Invalid {name}: {value}. Must be a finite number")
    for name in ("latency", "seconds_per_byte")
    for value in (-1.0, math.nan, math.inf)
]
# What is made, with arguments that are right, and those that are not.
WRONG: list[tuple[Any, dict[str, Any], list[tuple[dict[str, Any], str]]]] = [
    (Accordion, {"low": 1, "high": 4}, OF_ACCORDION),
    (LGreCo, {}, OF_L_GRECO),
    (CommunicationBudget, {}, OF_A_BUDGET),
    (StepTime, {}, OF_TIMES),
    (Network, {"latency": 1.0, "seconds_per_byte": 1.0}, OF_A_NETWORK),
]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [(make, right | own, message) for make, right, table in WRONG for own, message in table],
    ids=str,
)
def test_an_argument_that_is_out_of_range_is_refused(
    make: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**arguments)


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
        r"Invalid setting: 'density'. .* one of \['batch_dims', 'min_compression_rate', 'rank'",
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
