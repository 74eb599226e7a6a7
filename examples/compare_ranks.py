"""Compares SGD with PowerSGD of ranks 1, 2 and 4 on two real tasks, with four workers.

    python examples/compare_ranks.py

It prints a table in the form of Table 3 of the PowerSGD paper for each task, with means and
standard deviations over three seeds, and saves results (JSON) and a plot of quality against steps
and against bytes sent. "SGD" is torch.optim.SGD under DistributedDataParallel; all ranks use its
learning rate, momentum, weight decay and schedule unchanged, for as many steps.
"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import nn

from efsgd import PowerSGDOptimizer
from examples.baseline import sgd
from examples.builtin import DIGITS, TOPICS, digits_task, topics_task
from examples.comparison import Comparison, Subject, argument_parser
from examples.distributed import Workers
from examples.optimizers import Optimizer
from examples.settings import Settings
from examples.training import parameter_groups

IMAGES = "Image classification: a CNN on scikit-learn's digits"
WORDS = "Language modeling: an LSTM on Python's help topics"


def powersgd(
    model: nn.Module, settings: Settings, seed: int, workers: Workers, *, rank: int
) -> tuple[nn.Module, Optimizer]:
    """PowerSGD, with the same hyper-parameters."""
    groups = parameter_groups(model, settings.weight_decay)
    return model, PowerSGDOptimizer(groups, **settings.of_ours(), rank=rank, seed=seed)


if __name__ == "__main__":
    ranks = {f"Rank {rank}": partial(powersgd, rank=rank) for rank in (1, 2, 4)}
    Comparison(
        name="compare_ranks",
        subjects=[Subject(IMAGES, DIGITS, digits_task), Subject(WORDS, TOPICS, topics_task)],
        methods={"SGD": sgd, **ranks},
    ).run(argument_parser(__doc__).parse_args())
