"""Compares AdamW with AdamW on compressed gradients, on a real text, with four workers.

    python examples/any_optimizer.py

`efsgd.GradientAverager` replaces the gradients of each worker by their compressed average, and any
optimizer can go on from there (`AveragedOptimizer` in examples/optimizers.py). The table is that of
compare_ranks.py. "AdamW" is torch.optim.AdamW under DistributedDataParallel; all ranks use its
learning rate, weight decay and schedule unchanged, for as many steps.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import nn
from torch.optim import AdamW

from efsgd import GradientAverager, PowerSGD
from examples.baseline import data_parallel
from examples.builtin import TOPICS, topics_task
from examples.comparison import Comparison, Subject, argument_parser
from examples.distributed import Workers
from examples.optimizers import AveragedOptimizer, Optimizer
from examples.settings import Settings
from examples.training import parameter_groups

WORDS = "Language modeling with AdamW: an LSTM on Python's help topics"
# The learning rate is the best of a few for torch.optim.AdamW.
SETTINGS = replace(TOPICS, lr=5e-3, weight_decay=0.01)


def adamw(
    model: nn.Module, settings: Settings, seed: int, workers: Workers
) -> tuple[nn.Module, Optimizer]:
    """torch.optim.AdamW under DistributedDataParallel."""
    groups = parameter_groups(model, settings.weight_decay)
    return data_parallel(model, AdamW(groups, lr=settings.lr), workers)


def compressed_adamw(
    model: nn.Module, settings: Settings, seed: int, workers: Workers, *, rank: int
) -> tuple[nn.Module, Optimizer]:
    """The same on compressed gradients."""
    groups = parameter_groups(model, settings.weight_decay)
    averager = GradientAverager(model.named_parameters(), PowerSGD(rank, seed=seed))
    return model, AveragedOptimizer(AdamW(groups, lr=settings.lr), averager)


if __name__ == "__main__":
    ranks = {f"Rank {rank}": partial(compressed_adamw, rank=rank) for rank in (4, 8)}
    Comparison(
        name="any_optimizer",
        subjects=[Subject(WORDS, SETTINGS, topics_task)],
        methods={"AdamW": adamw, **ranks},
    ).run(argument_parser(__doc__).parse_args())
