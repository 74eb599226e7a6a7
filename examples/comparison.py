"""Trains several tasks with several methods, and shows what came of them in tables and plots."""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import multiprocessing, nn

from examples.distributed import Workers, join_workers
from examples.optimizers import Optimizer
from examples.reporting import comparison_table, plot_runs, progress_bar, save_json
from examples.settings import Settings
from examples.training import History, Task, Training, prepare, seed_worker

__all__ = ["Comparison", "Method", "Subject"]

#: Makes of a model, settings, the seed and the workers the model to call, and its optimizer.
Method = Callable[[nn.Module, Settings, int, Workers], tuple[nn.Module, Optimizer]]


@dataclass(frozen=True)
class Subject:
    """What is trained.

    Attributes:
        title: of its table.
        settings: hyper-parameters, the same for all methods.
        make: makes the task and a fresh model, of the batch size and the workers.
    """

    title: str
    settings: Settings
    make: Callable[[int, Workers], tuple[Task, nn.Module]]


@dataclass(frozen=True)
class Comparison:
    """Every method on every subject, some seeds each. It is pickled to start the workers.

    Attributes:
        name: of the files with results.
        description: for the command line.
        subjects: what is trained.
        methods: how; the first is what the others are compared with.
    """

    name: str
    description: str | None
    subjects: Sequence[Subject]
    methods: Mapping[str, Method]

    def main(self) -> None:
        """Reads the command line, starts the workers if torchrun has not, and runs."""
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--workers", type=int, default=4, help="processes (default: 4)")
        parser.add_argument("--seeds", type=int, default=3, help="trainings each (default: 3)")
        parser.add_argument("--epochs", type=int, help="fewer epochs than the settings say")
        parser.add_argument("--lr", type=float, help="learning rate of one worker, for trying out")
        parser.add_argument(
            "--output", type=Path, default=Path("results"), help="directory for results"
        )
        arguments = parser.parse_args()
        if "WORLD_SIZE" in os.environ:  # started by torchrun
            with join_workers() as workers:
                self._run(workers, arguments)
            return
        with tempfile.TemporaryDirectory() as folder:
            given = (arguments.workers, f"{folder}/meeting-point", arguments)
            multiprocessing.spawn(self._spawned, given, nprocs=arguments.workers)

    def _spawned(
        self, worker: int, world_size: int, meeting: str, arguments: argparse.Namespace
    ) -> None:
        os.environ.update(RANK=str(worker), WORLD_SIZE=str(world_size))
        with join_workers(f"file://{meeting}") as workers:
            self._run(workers, arguments)

    def _run(self, workers: Workers, arguments: argparse.Namespace) -> None:
        """Runs everything on one worker; the first one reports."""
        started = time.monotonic()
        given = {"epochs": arguments.epochs, "lr": arguments.lr}
        changes = {name: value for name, value in given.items() if value is not None}
        subjects = [replace(s, settings=replace(s.settings, **changes)) for s in self.subjects]
        runs: dict[str, dict[str, list[History]]] = {subject.title: {} for subject in subjects}
        qualities: dict[str, str] = {}
        for seed in range(1, arguments.seeds + 1):
            for method in self.methods:
                for subject in subjects:
                    history, quality = self._train(subject, method, seed, workers)
                    qualities[subject.title] = quality
                    runs[subject.title].setdefault(method, []).append(history)
        if not workers.is_first:
            return
        console = Console(width=None if Console().is_terminal else 100)
        for title, of_subject in runs.items():
            console.print(comparison_table(title, qualities[title], of_subject), end="\n\n")
        about = f"{workers.world_size} workers, {arguments.seeds} seeds, {os.cpu_count()} cores"
        seconds = time.monotonic() - started
        console.print(f"{about}, torch {torch.__version__}, {seconds:.0f} s in all")
        settings = {subject.title: subject.settings for subject in subjects}
        content = {"about": about, "quality": qualities, "settings": settings, "runs": runs}
        path = arguments.output / self.name
        save_json(path.with_suffix(".json"), content)
        plotted = {title: (qualities[title], of_subject) for title, of_subject in runs.items()}
        plot_runs(path.with_suffix(".png"), plotted)
        console.print(f"saved {path}.json and {path}.png")

    def _train(
        self, subject: Subject, method: str, seed: int, workers: Workers
    ) -> tuple[History, str]:
        """Trains one model with one method: what came of it, and what its quality means."""
        settings = subject.settings
        prepare(workers, seed)
        task, model = subject.make(settings.batch_size, workers)
        model, optimizer = self.methods[method](model, settings, seed, workers)
        seed_worker(seed, workers.worker)
        steps = settings.epochs * task.steps_per_epoch
        with progress_bar(f"{method}, seed {seed}", steps, visible=workers.is_first) as report:
            training = Training(task, model, optimizer, settings, workers, seed)
            return training.run(report), task.quality
