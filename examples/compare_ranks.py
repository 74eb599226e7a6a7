"""Compares SGD with PowerSGD of ranks 1, 2 and 4 on two real tasks, with four workers.

    python examples/compare_ranks.py

It prints a table in the form of Table 3 of the PowerSGD paper for each task, with means and
standard deviations over three seeds, and saves results (JSON) and a plot of quality against steps
and against bytes sent. "SGD" is torch.optim.SGD under DistributedDataParallel; all ranks use its
learning rate, momentum, weight decay and schedule unchanged, for as many steps.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from torch import multiprocessing, nn

from efsgd import PowerSGDOptimizer
from examples.baseline import data_parallel_sgd
from examples.data import digits, text
from examples.distributed import Workers, join_workers
from examples.models import DigitsCNN
from examples.reporting import comparison_table, plot_runs, progress_bar, save_json
from examples.settings import Settings
from examples.tasks import (
    DIGITS,
    TOPICS,
    WINDOW,
    ImageClassification,
    LanguageModeling,
    topics_model,
)
from examples.training import History, Task, Training, parameter_groups, prepare, seed_worker

RANKS = (None, 1, 2, 4)  # None is SGD
IMAGES = "Image classification: a CNN on scikit-learn's digits"
WORDS = "Language modeling: an LSTM on Python's help topics"
Runs = dict[str, list[History]]


def name_of(rank: int | None) -> str:
    """How a method is called in tables."""
    return "SGD" if rank is None else f"Rank {rank}"


def run(
    task: Task, model: nn.Module, settings: Settings, rank: int | None, seed: int, workers: Workers
) -> History:
    """Trains one model with one method."""
    groups = parameter_groups(model, settings.weight_decay)
    if rank is None:
        model, optimizer = data_parallel_sgd(model, groups, workers, **settings.of_sgd())
    else:
        optimizer = PowerSGDOptimizer(groups, **settings.of_ours(), rank=rank, seed=seed)
    seed_worker(seed, workers.worker)
    title = f"{name_of(rank)}, seed {seed}"
    steps = settings.epochs * task.steps_per_epoch
    with progress_bar(title, steps, visible=workers.is_first) as report:
        return Training(task, model, optimizer, settings, workers, seed).run(report)


def compare(workers: Workers, arguments: argparse.Namespace) -> None:
    """Runs everything on one worker; the first one reports."""
    started = time.monotonic()
    corpus, images = text.load_topics(), digits.load()
    shorten = {} if arguments.epochs is None else {"epochs": arguments.epochs}
    of_images, of_words = replace(DIGITS, **shorten), replace(TOPICS, **shorten)
    runs: dict[str, Runs] = {IMAGES: {}, WORDS: {}}
    qualities = {IMAGES: ImageClassification.quality, WORDS: LanguageModeling.quality}
    for seed in range(1, arguments.seeds + 1):
        for rank in RANKS:
            prepare(workers, seed)
            model: nn.Module = DigitsCNN()
            task: Task = ImageClassification(images, of_images.batch_size, workers, 1, False)
            history = run(task, model, of_images, rank, seed, workers)
            runs[IMAGES].setdefault(name_of(rank), []).append(history)
            prepare(workers, seed)
            model = topics_model(corpus)
            task = LanguageModeling(corpus, of_words.batch_size, WINDOW, workers)
            history = run(task, model, of_words, rank, seed, workers)
            runs[WORDS].setdefault(name_of(rank), []).append(history)
    if not workers.is_first:
        return
    console = Console(width=None if Console().is_terminal else 100)
    for title, of_task in runs.items():
        console.print(comparison_table(title, qualities[title], of_task), end="\n\n")
    about = f"{workers.world_size} workers, {arguments.seeds} seeds, {os.cpu_count()} cores"
    console.print(f"{about}, torch {torch.__version__}, {time.monotonic() - started:.0f} s in all")
    output: Path = arguments.output
    settings = {IMAGES: of_images, WORDS: of_words}
    content = {"about": about, "quality": qualities, "settings": settings, "runs": runs}
    save_json(output / "compare_ranks.json", content)
    plotted = {title: (qualities[title], of_task) for title, of_task in runs.items()}
    plot_runs(output / "compare_ranks.png", plotted)
    console.print(f"saved {output}/compare_ranks.json and {output}/compare_ranks.png")


def spawned(worker: int, world_size: int, meeting: str, arguments: argparse.Namespace) -> None:
    """What one of the processes does that this script has started itself."""
    os.environ.update(RANK=str(worker), WORLD_SIZE=str(world_size))
    with join_workers(f"file://{meeting}") as workers:
        compare(workers, arguments)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=4, help="processes to start (default: 4)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings per method (default: 3)")
    parser.add_argument("--epochs", type=int, help="fewer epochs than the settings say")
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="directory for results"
    )
    arguments = parser.parse_args()
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        with join_workers() as workers:
            compare(workers, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        given = (arguments.workers, f"{folder}/meeting-point", arguments)
        multiprocessing.spawn(spawned, given, nprocs=arguments.workers)


if __name__ == "__main__":
    main()
