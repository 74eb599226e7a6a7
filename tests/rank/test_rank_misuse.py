"""What users may do wrong with rank schedulers: the message has what was given, and the remedy."""

import math

import pytest
import torch

from efsgd import ErrorFeedbackSGD, GradientAverager, PowerSGD, PowerSGDOptimizer, TopK
from efsgd.rank import Accordion, RankScheduler
from tests.optimizers.misuse import Case, a_parameter, ids, invalid
from tests.rank.rank_runs import individual

GOOD = {"low": 1, "high": 4}
FINITE = "Must be a finite number of at least 0."
COUNT = "Must be an integer of at least 1"

ARGUMENTS = [
    *(
        invalid(
            name, value, FINITE, lambda n=name, v=value: Accordion(**{**GOOD, n: v}), ValueError
        )
        for name in ("low", "high", "threshold", "lr_fall")
        for value in (-1, math.inf, math.nan, "4", None, True)
    ),
    *(
        invalid(name, value, COUNT, lambda n=name, v=value: Accordion(**{**GOOD, n: v}), ValueError)
        for name in ("interval", "sketch")
        for value in (0, -1, 1.0, math.inf, "4", True)
    ),
    invalid("interval", None, COUNT, lambda: Accordion(1, 4, interval=None), ValueError),
    invalid("scope", "all", "'layer', 'model'", lambda: Accordion(1, 4, scope="all"), ValueError),
    invalid(
        "gradients",
        "own",
        "'mean', 'worker 0'",
        lambda: Accordion(1, 4, gradients="own"),
        ValueError,
    ),
    Case(
        "high before low",
        lambda: Accordion(4, 1),
        ValueError,
        "Invalid low and high: 4 and 1.",
        "low is for windows in which little changes, and must not exceed high.",
    ),
]


@pytest.mark.parametrize("case", ids(ARGUMENTS))
def test_an_argument_of_accordion_that_is_out_of_range_is_refused(case: Case) -> None:
    case.check()


def powersgd() -> PowerSGDOptimizer:
    return PowerSGDOptimizer([a_parameter()], lr=0.1)


def averager(lr_of: object) -> RankScheduler:
    return RankScheduler(GradientAverager([a_parameter()]), Accordion(1, 4), lr_of=lr_of)


SCHEDULERS = [
    Case(
        "another optimizer",
        lambda: RankScheduler(torch.optim.SGD([a_parameter()], lr=0.1), Accordion(1, 4)),
        TypeError,
        "Invalid optimizer: SGD.",
        "Must be one of this package, for example efsgd.PowerSGDOptimizer.",
    ),
    Case(
        "no policy",
        lambda: RankScheduler(powersgd(), 4),
        TypeError,
        "Invalid policy: 4.",
        "Must be an efsgd.rank.RankPolicy, for example Accordion(low=1, high=4).",
    ),
    Case(
        "a class of policies",
        lambda: RankScheduler(powersgd(), Accordion),
        TypeError,
        "Invalid policy: <class",
        "Must be an efsgd.rank.RankPolicy",
    ),
    Case(
        "a scheduler of learning rates",
        lambda: averager(torch.optim.lr_scheduler.ConstantLR(powersgd())),
        TypeError,
        "Invalid lr_of: ConstantLR.",
        "Must be a torch.optim.Optimizer of the same parameters, or None",
    ),
    Case(
        "an optimizer of other parameters",
        lambda: averager(torch.optim.SGD([a_parameter()], lr=0.1)),
        ValueError,
        "Invalid lr_of: SGD.",
        "Must have the parameters that are compressed",
    ),
    Case(
        "no such setting",
        lambda: RankScheduler(powersgd(), Accordion(1, 4, setting="density")),
        ValueError,
        "Invalid setting: 'density'.",
        "one of ['min_compression_rate', 'rank'",
    ),
    Case(
        "a setting of all parameters together",
        lambda: RankScheduler(powersgd(), Accordion(0, 1, setting="seed")),
        ValueError,
        "Invalid setting: 'seed'.",
        "Must be a setting of PowerSGD that each parameter may have for itself",
    ),
    Case(
        "a rank of zero",
        lambda: RankScheduler(powersgd(), Accordion(0, 4)),
        ValueError,
        "Invalid rank: 0.",
        "Must be an integer of at least 1.",
    ),
    Case(
        "half a rank",
        lambda: RankScheduler(powersgd(), Accordion(1, 2.5)),
        ValueError,
        "Invalid rank: 2.5.",
        "Must be an integer of at least 1.",
    ),
    Case(
        "a density beside a rank",
        lambda: RankScheduler(
            ErrorFeedbackSGD([a_parameter()], lr=0.1, compressor=TopK(rank=2)),
            Accordion(0.1, 0.5, setting="density"),
        ),
        ValueError,
        "Invalid density and rank: 0.1 and 2.",
        "set the other to None.",
    ),
    Case(
        "nothing to compress",
        lambda: RankScheduler(
            PowerSGDOptimizer([a_parameter()], lr=0.1, min_compression_rate=math.inf),
            Accordion(1, 4),
        ),
        ValueError,
        "Invalid rank values: [1, 4].",
        "there is nothing to decide on.",
    ),
]


@pytest.mark.parametrize("case", ids(SCHEDULERS))
def test_what_does_not_go_together_is_refused(case: Case) -> None:
    case.check()


def test_an_optimizer_is_as_it_was_where_a_scheduler_is_refused() -> None:
    optimizer = ErrorFeedbackSGD([a_parameter()], lr=0.1, compressor=PowerSGD(rank=3))
    for policy in (Accordion(0, 4), Accordion(1, 4, setting="density")):
        with pytest.raises(ValueError):
            RankScheduler(optimizer, policy)
    with pytest.raises(ValueError):
        RankScheduler(optimizer, Accordion(1, 4), lr_of=powersgd())
    assert individual(optimizer) == [None]
    assert optimizer.param_groups[0]["per_parameter"] is None
    assert optimizer._engine.watchers == []
