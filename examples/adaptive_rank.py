"""Compares fixed ranks with ranks that change while training goes on, with four workers.

    python examples/adaptive_rank.py

Accordion takes a high rank where gradients change much and a low one elsewhere; L-GreCo gives each
layer a rank of its own, such that all together send the least for the error of the high rank, or of
what Accordion chooses. It prints a table in the form of Tables 1 and 2 of the Accordion paper for
each of two real tasks, with means and standard deviations over three seeds, and saves results
(JSON) and a plot of each layer's rank over the steps. All methods use the same learning rate,
momentum, weight decay and schedule, for as many steps; what decisions send counts as sent.

With `--data DIR`: the ResNet18 and the ranks of the paper on CIFAR-10, which needs GPUs.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import nn

from efsgd import PowerSGDOptimizer
from efsgd.rank import Accordion, LGreCo, RankPolicy, RankScheduler
from examples.adaptation import adaptation_table, plot_ranks
from examples.builtin import DIGITS, TOPICS, digits_task, topics_task
from examples.comparison import Comparison, Subject, argument_parser
from examples.distributed import Workers
from examples.downloaded import cifar10_task
from examples.optimizers import Optimizer
from examples.settings import Settings
from examples.tasks import CIFAR10
from examples.training import parameter_groups


@dataclass(frozen=True)
class Choices:
    """What the policies are given.

    Attributes:
        low: the rank outside of critical regimes.
        high: the rank in critical regimes, and the one whose error L-GreCo keeps.
        accordion: further arguments of Accordion.
        l_greco: further arguments of L-GreCo.
    """

    low: int
    high: int
    accordion: Mapping[str, Any]
    l_greco: Mapping[str, Any]


# The same for both small tasks, whose trainings have 20 windows each. A decision of Accordion
# stands for 4 of them, also one that a fall of the learning rate brings about. Their layers are so
# small that a sketch of the default size would be all of a gradient, and that one decision of
# L-GreCo on the mean over the workers sends as much as several steps. On worker 0's own gradients,
# as in the authors' code, it sends next to nothing.
SMALL = Choices(
    2,
    4,
    {"interval": 4, "sketch": 256},
    {"interval": 5, "shrink": 0.25, "gradients": "worker 0"},
)
# Those of the paper.
RESNET18 = Choices(1, 2, {"interval": 10}, {"interval": 10})


def named_groups(model: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """The parameter groups of all examples, with the parameters' names."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, settings.weight_decay)
    return [{**group, "params": [(names[p], p) for p in group["params"]]} for group in groups]


def powersgd(
    model: nn.Module, settings: Settings, seed: int, workers: Workers, *, rank: int
) -> tuple[nn.Module, Optimizer]:
    """PowerSGD, with the hyper-parameters of SGD."""
    groups = named_groups(model, settings)
    return model, PowerSGDOptimizer(groups, **settings.of_ours(), rank=rank, seed=seed)


def accordion(choices: Choices) -> RankPolicy:
    """A new Accordion."""
    return Accordion(choices.low, choices.high, **choices.accordion)


def l_greco(choices: Choices) -> RankPolicy:
    """A new L-GreCo, whose layers together have no more error than at the high rank."""
    return LGreCo(choices.high, **choices.l_greco)


def l_greco_after_accordion(choices: Choices) -> RankPolicy:
    """A new L-GreCo, whose layers together have no more error than Accordion's choice."""
    return LGreCo(accordion(choices), **choices.l_greco)


def scheduled(
    optimizer: PowerSGDOptimizer, *, policy: Callable[[Choices], RankPolicy], choices: Choices
) -> RankScheduler:
    """A scheduler with a new policy: policies remember what they have seen."""
    return RankScheduler(optimizer, policy(choices))


POLICIES = {
    "Accordion": accordion,
    "L-GreCo": l_greco,
    "L-GreCo and Accordion": l_greco_after_accordion,
}


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or these words of one."""
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10's binary files")
    parser.add_argument("--low-rank", type=int, help="default: 2, of ResNet18 1")
    parser.add_argument("--high-rank", type=int, help="default: 4, of ResNet18 2")
    parser.add_argument(
        "--interval", type=int, help="windows between decisions of Accordion (4, of ResNet18 10)"
    )
    return parser.parse_args(words)


def subjects(arguments: argparse.Namespace) -> list[Subject]:
    """What is trained."""
    if arguments.data:
        make = partial(cifar10_task, directory=arguments.data)
        return [Subject("Image classification: ResNet18 on CIFAR-10", CIFAR10, make)]
    return [
        Subject("Image classification: a CNN on scikit-learn's digits", DIGITS, digits_task),
        Subject("Language modeling: an LSTM on Python's help topics", TOPICS, topics_task),
    ]


def comparison(arguments: argparse.Namespace) -> Comparison:
    """What the command line asks for; the first method is the high rank."""
    choices = RESNET18 if arguments.data else SMALL
    given = {"low": arguments.low_rank, "high": arguments.high_rank}
    choices = replace(choices, **{name: rank for name, rank in given.items() if rank is not None})
    if arguments.interval is not None:
        accordion_s = {**choices.accordion, "interval": arguments.interval}
        choices = replace(choices, accordion=accordion_s)
    fixed = {f"Rank {rank}": rank for rank in (choices.high, choices.low)}
    ranks = {**fixed, **dict.fromkeys(POLICIES, choices.high)}
    return Comparison(
        name="adaptive_rank",
        subjects=subjects(arguments),
        methods={name: partial(powersgd, rank=rank) for name, rank in ranks.items()},
        schedulers={
            name: partial(scheduled, policy=policy, choices=choices)
            for name, policy in POLICIES.items()
        },
        table=adaptation_table,
        plot=plot_ranks,
    )


if __name__ == "__main__":
    arguments = parse_arguments()
    comparison(arguments).run(arguments)
