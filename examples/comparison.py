"""Trains several tasks with several methods, and shows what came of them in tables and plots."""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from examples.distributed import Workers, join_workers, start_workers
from examples.history import History
from examples.optimizers import Optimizer, Scheduler
from examples.reporting import comparison_table, markdown, plot_runs, progress_bar, save_json
from examples.settings import Settings
from examples.training import Task, Training, prepare, seed_worker

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


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of all comparisons; a script may add some of its own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=4, help="processes (default: 4)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings each (default: 3)")
    parser.add_argument("--epochs", type=int, help="fewer epochs than the settings say")
    parser.add_argument("--batch-size", type=int, help="images or streams per worker")
    parser.add_argument("--lr", type=float, help="learning rate of one worker, for trying out")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="directory for results"
    )
    return parser


@dataclass(frozen=True)
class Comparison:
    """Every method on every subject, some seeds each. Workers that are not forked get it pickled.

    Attributes:
        name: of the files with results.
        subjects: what is trained.
        methods: how; the first is what the others are compared with.
        schedulers: makes a rank scheduler of a method's optimizer, for methods that have one.
        overrides_of: hyper-parameters in which a method differs from the subjects' settings.
        table: makes one of a subject's title, what its quality means, and histories by method.
        plot: draws, under a path, what quality means and histories by method, for each subject.
    """

    name: str
    subjects: Sequence[Subject]
    methods: Mapping[str, Method]
    schedulers: Mapping[str, Callable[[Any], Scheduler]] = field(default_factory=dict)
    overrides_of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    table: Callable[[str, str, Mapping[str, Sequence[History]]], Table] = comparison_table
    plot: Callable[[Path, Mapping[str, tuple[str, Mapping[str, Sequence[History]]]]], None] = (
        plot_runs
    )

    def run(self, arguments: argparse.Namespace) -> None:
        """Starts the workers if torchrun has not, trains, and shows what came of it.

        Args:
            arguments: what the parser of `argument_parser` has read.
        """
        if "WORLD_SIZE" in os.environ:  # started by torchrun
            with join_workers() as workers:
                self._run(workers, arguments)
            return
        with tempfile.TemporaryDirectory() as folder:
            given = (arguments.workers, f"{folder}/meeting-point", arguments)
            start_workers(self._spawned, given, arguments.workers)

    def _spawned(
        self, worker: int, world_size: int, meeting: str, arguments: argparse.Namespace
    ) -> None:
        os.environ.update(RANK=str(worker), WORLD_SIZE=str(world_size))
        with join_workers(f"file://{meeting}") as workers:
            self._run(workers, arguments)

    def _run(self, workers: Workers, arguments: argparse.Namespace) -> None:
        """Runs everything on one worker; the first one reports."""
        started = time.monotonic()
        names = ("epochs", "batch_size", "lr")
        given = {name: getattr(arguments, name) for name in names}
        changes = {name: value for name, value in given.items() if value is not None}
        subjects = [replace(s, settings=replace(s.settings, **changes)) for s in self.subjects]
        runs: dict[str, dict[str, list[History]]] = {subject.title: {} for subject in subjects}
        qualities: dict[str, str] = {}
        console = Console(width=None if Console().is_terminal else 110)
        for subject in subjects:
            of_subject = runs[subject.title]
            # Methods take turns, so that none has all its seeds while the machine is slow.
            for seed in range(1, arguments.seeds + 1):
                for method in self.methods:
                    history, qualities[subject.title] = self._train(subject, method, seed, workers)
                    of_subject.setdefault(method, []).append(history)
            if workers.is_first:
                table = self.table(subject.title, qualities[subject.title], of_subject)
                if arguments.markdown:
                    print(markdown(table), flush=True)
                else:
                    console.print(table, end="\n\n")
        if not workers.is_first:
            return
        about = f"{workers.world_size} workers, {arguments.seeds} seeds, {os.cpu_count()} cores"
        seconds = time.monotonic() - started
        settings = {subject.title: subject.settings for subject in subjects}
        content = {"about": about, "quality": qualities, "settings": settings}
        content |= {"overrides_of": self.overrides_of, "runs": runs}
        console.print(f"{about}, torch {torch.__version__}, {seconds:.0f} s in all")
        path = arguments.output / self.name
        save_json(path.with_suffix(".json"), content)
        shown = {title: (qualities[title], of_subject) for title, of_subject in runs.items()}
        self.plot(path.with_suffix(".png"), shown)
        console.print(f"saved {path}.json and {path}.png")

    def _train(
        self, subject: Subject, method: str, seed: int, workers: Workers
    ) -> tuple[History, str]:
        """Trains one model with one method: what came of it, and what its quality means."""
        settings = replace(subject.settings, **self.overrides_of.get(method, {}))
        prepare(workers, seed)
        task, model = subject.make(settings.batch_size, workers)
        model, optimizer = self.methods[method](model, settings, seed, workers)
        make_scheduler = self.schedulers.get(method)
        scheduler = None if make_scheduler is None else make_scheduler(optimizer)
        seed_worker(seed, workers.worker)
        steps = settings.epochs * task.steps_per_epoch
        with progress_bar(f"{method}, seed {seed}", steps, visible=workers.is_first) as report:
            training = Training(task, model, optimizer, settings, workers, seed, scheduler)
            return training.run(report), task.quality
