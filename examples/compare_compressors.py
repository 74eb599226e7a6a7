"""Compares PowerSGD with other compressors that send as many bytes, with four workers.

    python examples/compare_compressors.py

It prints a table in the form of Table 4 of the PowerSGD paper, with means and standard deviations
over three seeds, and saves results (JSON) and a plot of quality against bytes sent. All methods of
a budget send about as much as PowerSGD of the rank that is named, and all keep what they have not
sent as error. "No compression" is torch.optim.SGD under DistributedDataParallel; all use its
learning rate, momentum, weight decay and schedule unchanged, for as many steps.

Without further arguments: a small CNN on scikit-learn's scans of handwritten digits, for some
minutes. With `--data DIR`: the ResNet18 and the budgets of the paper on CIFAR-10, which needs GPUs.
`--all` adds methods that have no budget in that table, `--only` leaves others out.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import nn

from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    PowerSGD,
    PowerSGDPlus,
    RandomBlock,
    RandomK,
    SignNorm,
    Signum,
    SpectralAtomo,
    TopK,
    UniformQuantized,
)
from examples.baseline import sgd
from examples.budgets import Candidate, budget_table, plot_budgets
from examples.builtin import DIGITS, digits_task
from examples.comparison import Comparison, Subject, argument_parser
from examples.distributed import Workers
from examples.downloaded import cifar10_task
from examples.optimizers import Optimizer
from examples.settings import Settings
from examples.tasks import CIFAR10
from examples.training import parameter_groups

MEDIUM, HIGH, FURTHER = "Medium", "High", "Further"


def compressed(
    model: nn.Module,
    settings: Settings,
    seed: int,
    workers: Workers,
    *,
    compressor: Any,
    error_feedback: bool,
) -> tuple[nn.Module, Optimizer]:
    """Error-feedback SGD with a compressor, and the hyper-parameters of SGD."""
    groups = parameter_groups(model, settings.weight_decay)
    if "seed" in compressor.settings():
        compressor = replace(compressor, seed=seed)
    return model, ErrorFeedbackSGD(
        groups, **settings.of_ours(), compressor=compressor, error_feedback=error_feedback
    )


def signum(
    model: nn.Module, settings: Settings, seed: int, workers: Workers
) -> tuple[nn.Module, Optimizer]:
    """Signs of momenta, and a majority vote on them."""
    groups = parameter_groups(model, settings.weight_decay)
    return model, Signum(groups, lr=settings.lr, momentum=settings.momentum)


def candidate(
    budget: str, algorithm: str, compressor: Any, family: str = "", error_feedback: bool = True
) -> Candidate:
    """One of error-feedback SGD with this compressor."""
    train = partial(compressed, compressor=compressor, error_feedback=error_feedback)
    return Candidate(budget, algorithm, family or algorithm, compressor.claims().averages, train)


def within_budget(budget: str, rank: int, top_k: TopK) -> list[Candidate]:
    """Those that send as much as PowerSGD of this rank."""
    return [
        candidate(budget, f"Rank {rank}", PowerSGD(rank), family="PowerSGD"),
        candidate(budget, "Random Block", RandomBlock(rank=rank)),
        candidate(budget, "Random K", RandomK(rank=rank)),
        candidate(budget, "Top K", top_k),
    ]


def further(rank: int) -> list[Candidate]:
    """Those that have no budget in the paper's Table 4, of this rank where they have one."""
    atomo = SpectralAtomo(rank=rank)
    return [
        candidate(FURTHER, f"Rank {rank}, alternating", PowerSGD(rank, alternating=True)),
        candidate(FURTHER, f"PowerSGD+, rank {rank}", PowerSGDPlus(rank)),
        candidate(FURTHER, f"LQ-SGD, rank {rank}", LQSGD(rank)),
        candidate(FURTHER, f"Spectral Atomo, rank {rank}", atomo, error_feedback=False),
        candidate(FURTHER, "8 bits", UniformQuantized(bits=8)),
        Candidate(FURTHER, "Signum", "Signum", averages=False, train=signum),
    ]


def candidates(arguments: argparse.Namespace) -> list[Candidate]:
    """Those that the command line asks for; the first is the baseline."""
    # The paper gives Top K's budget as a fraction of all bytes, half of which are positions.
    ranks, fractions = ((7, 2), (1 / 32, 1 / 136)) if arguments.data else ((4, 1), (None, None))
    given = (arguments.medium_rank, arguments.high_rank)
    budgets = []
    for budget, rank, fraction, own in zip((MEDIUM, HIGH), ranks, fractions, given, strict=True):
        is_paper_s = fraction is not None and own is None
        top_k = TopK.from_compression(fraction) if is_paper_s else TopK(rank=own or rank)
        budgets.append(within_budget(budget, own or rank, top_k))
    medium, high = budgets
    medium.insert(3, candidate(MEDIUM, "Sign+Norm", SignNorm()))
    others = medium + high + (further(given[0] or ranks[0]) if arguments.all else [])
    if arguments.only:
        words = [word.lower() for word in arguments.only]
        others = [each for each in others if any(word in each.name.lower() for word in words)]
        if not others:
            raise ValueError(f"No method has any of these words: {' '.join(arguments.only)}.")
    return [Candidate("", "No compression", "No compression", averages=True, train=sgd), *others]


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or these words of one."""
    parser = argument_parser(__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10's binary files")
    parser.add_argument("--medium-rank", type=int, help="default: 4, of ResNet18 7")
    parser.add_argument("--high-rank", type=int, help="default: 1, of ResNet18 2")
    parser.add_argument("--all", action="store_true", help="further methods, of the medium rank")
    parser.add_argument(
        "--only", nargs="+", metavar="WORD", help="methods whose names have any of these words"
    )
    parser.add_argument(
        "--signum-lr",
        type=float,
        help="Signum's learning rate of one worker (default: 2e-4, of ResNet18 the paper's 5e-5)",
    )
    return parser.parse_args(words)


def main(arguments: argparse.Namespace, chosen: Sequence[Candidate]) -> None:
    """Trains with each of these methods."""
    if arguments.data:
        make = partial(cifar10_task, directory=arguments.data)
        subject = Subject("Image classification: ResNet18 on CIFAR-10", CIFAR10, make)
    else:
        title = "Image classification: a CNN on scikit-learn's digits"
        subject = Subject(title, DIGITS, digits_task)
    by_name = {each.name: each for each in chosen}
    signum_lr = arguments.signum_lr or (5e-5 if arguments.data else 2e-4)
    Comparison(
        name="compare_compressors",
        subjects=[subject],
        methods={name: each.train for name, each in by_name.items()},
        overrides_of={f"{FURTHER}: Signum": {"lr": signum_lr}} if arguments.all else {},
        table=partial(budget_table, candidates=by_name),
        plot=partial(plot_budgets, candidates=by_name),
    ).run(arguments)


if __name__ == "__main__":
    arguments = parse_arguments()
    main(arguments, candidates(arguments))
