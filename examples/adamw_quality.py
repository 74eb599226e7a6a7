"""How well AdamW trains a small GPT on gradients that were compressed, learning rates tuned by row.

    python examples/adamw_quality.py

Every row takes as many steps, with four workers, on Python's help topics. First each row is trained
once with each learning rate; then, with the best of them, from three other seeds, which is what the
table says. What each training has found is saved as soon as it is over, and --resume goes on from
there. --rows chooses rows; the whole takes hours on two cores.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from efsgd import LQSGD, GradientAverager, PowerSGD, PowerSGDPlus, TopK
from examples.baseline import data_parallel
from examples.data import text
from examples.distributed import Workers, join_workers, start_workers
from examples.history import History
from examples.models import GPTLanguageModel
from examples.optimizers import AveragedOptimizer, Optimizer, Wrapped
from examples.reporting import MIB, markdown, progress_bar, save_json
from examples.settings import Settings
from examples.tasks import LanguageModeling
from examples.training import Training, prepare, seed_worker

Made = tuple[nn.Module, Optimizer]

WINDOW, WIDTH, LAYERS, HEADS = 32, 64, 2, 4
SETTINGS = Settings(epochs=8, batch_size=8, lr=1e-3, warmup_epochs=1, decay_at=(0.6, 0.85))
RATES = (5e-4, 1e-3, 2e-3, 4e-3)  # of one worker
TUNING_SEED = 1
START = 70  # steps, one epoch


def adamw(parameters: Iterable[Any], settings: Settings) -> torch.optim.Optimizer:
    """The optimizer of all rows."""
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.01)


def plain(model: nn.Module, settings: Settings, workers: Workers) -> Made:
    """Under DistributedDataParallel."""
    return data_parallel(model, adamw(model.parameters(), settings), workers)


def averaged(
    model: nn.Module,
    settings: Settings,
    workers: Workers,
    *,
    compressor: Any,
    embeddings: bool = True,
    **options: Any,
) -> Made:
    """On gradients that an averager has compressed; `embeddings` says whether theirs are, too."""
    named = dict(model.named_parameters())
    tables = [(name, named.pop(name)) for name in list(named) if "table" in name]
    groups = [{"params": list(named.items())}, {"params": tables}]
    if not embeddings:
        groups[1]["min_compression_rate"] = math.inf
    averager = GradientAverager(groups, compressor, **options)
    return model, AveragedOptimizer(adamw(model.parameters(), settings), averager)


class Resetting(AveragedOptimizer):
    """Forgets all errors once in an epoch."""

    steps = 0

    def step(self) -> Any:
        """One step, before which errors may be set to zero."""
        self.steps += 1
        if self.steps % START == 0:
            for state in self.averager.state.values():
                if "error" in state:
                    state["error"].zero_()
        return super().step()


def resetting(model: nn.Module, settings: Settings, workers: Workers, *, compressor: Any) -> Made:
    """Errors do not outlive an epoch."""
    averager = GradientAverager(model.named_parameters(), compressor)
    return model, Resetting(adamw(model.parameters(), settings), averager)


class Hooked(Wrapped):
    """An optimizer under torch's hook, which counts what it compresses."""

    def __init__(self, optimizer: torch.optim.Optimizer, state: PowerSGDState) -> None:
        super().__init__(optimizer)
        self.state = state

    def communication_stats(self) -> dict[str, Any]:
        """In float32; steps before compression are not counted by the hook."""
        elements = self.state.compression_stats()[2]  # of all steps together
        return {"total_bytes_sent": 4 * elements, "check_bytes_sent": 0}


def hooked(model: nn.Module, settings: Settings, workers: Workers, *, rank: int) -> Made:
    """torch's own hook, with one bucket: with several it stands still on gloo."""
    ddp = DistributedDataParallel(model, bucket_cap_mb=10_000)
    state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=START)
    ddp.register_comm_hook(state, powerSGD_hook)
    return ddp, Hooked(adamw(model.parameters(), settings), state)


ROWS: dict[str, Callable[[nn.Module, Settings, Workers], Made]] = {
    "AdamW": plain,
    **{f"Rank {rank}": partial(averaged, compressor=PowerSGD(rank)) for rank in (4, 8, 16, 32)},
    "Rank 8, from the second epoch on": partial(
        averaged, compressor=PowerSGD(8), start_compressing_at=START
    ),
    "Rank 8, embeddings uncompressed": partial(averaged, compressor=PowerSGD(8), embeddings=False),
    "Rank 8, errors reset each epoch": partial(resetting, compressor=PowerSGD(8)),
    "Rank 8, no error feedback": partial(averaged, compressor=PowerSGD(8), error_feedback=False),
    "torch's hook, rank 8, from the second epoch on": partial(hooked, rank=8),
    "PowerSGD+, rank 8": partial(averaged, compressor=PowerSGDPlus(8)),
    "LQ-SGD, rank 8": partial(averaged, compressor=LQSGD(8)),
    "Top-K, bytes of rank 8": partial(averaged, compressor=TopK(rank=8)),
}


@dataclass(frozen=True)
class Run:
    """One training: a row, a learning rate of one worker, and a seed."""

    row: str
    rate: float
    seed: int

    @property
    def key(self) -> str:
        """In the file of results."""
        return f"{self.row} | {self.rate:g} | {self.seed}"


def task_and_model(settings: Settings, workers: Workers) -> tuple[LanguageModeling, nn.Module]:
    """The text and a small GPT."""
    corpus = text.load_topics()
    model = GPTLanguageModel(len(corpus.vocabulary), WIDTH, LAYERS, HEADS, WINDOW, dropout=0.1)
    return LanguageModeling(corpus, settings.batch_size, WINDOW, workers), model


def train(run: Run, settings: Settings, workers: Workers) -> dict[str, float]:
    """What a training comes to: final perplexity, and the bytes that one worker has sent."""
    settings = replace(settings, lr=run.rate)
    prepare(workers, run.seed)
    task, model = task_and_model(settings, workers)
    model, optimizer = ROWS[run.row](model, settings, workers)
    seed_worker(run.seed, workers.worker)
    steps = settings.epochs * task.steps_per_epoch
    with progress_bar(run.key, steps, visible=workers.is_first) as report:
        training = Training(task, model, optimizer, settings, workers, run.seed)
        history: History = training.run(report)
    return {"perplexity": history.quality[-1], "bytes": history.bytes_per_epoch}


def best_rate(row: str, rates: Sequence[float], found: Mapping[str, Mapping[str, float]]) -> float:
    """That with which the tuning seed has come furthest."""
    return min(rates, key=lambda rate: found[Run(row, rate, TUNING_SEED).key]["perplexity"])


def run_all(workers: Workers, arguments: argparse.Namespace) -> None:
    """Tunes and trains all rows on one worker; the first one saves and reports."""
    path: Path = arguments.output / "adamw_quality.json"
    settings = SETTINGS if arguments.epochs is None else replace(SETTINGS, epochs=arguments.epochs)
    found: dict[str, Any] = {}
    if arguments.resume and path.exists():
        found = json.loads(path.read_text())
    (found,) = workers.gather(found)[:1]

    def settle(run: Run) -> None:
        if run.key not in found:
            found[run.key] = train(run, settings, workers)
            if workers.is_first:
                save_json(path, found)

    for rate in arguments.rates:
        for row in arguments.rows:
            settle(Run(row, rate, TUNING_SEED))
    for seed in range(TUNING_SEED + 1, TUNING_SEED + 1 + arguments.seeds):
        for row in arguments.rows:
            settle(Run(row, best_rate(row, arguments.rates, found), seed))
    if workers.is_first:
        show(arguments, found)


def show(arguments: argparse.Namespace, found: Mapping[str, Mapping[str, float]]) -> None:
    """Prints the table."""
    table = Table(title="A small GPT on Python's help topics", title_justify="left")
    for column in ("", "Test perplexity", "Sent per epoch", "Best learning rate"):
        table.add_column(column, justify="right" if column else "left")
    for row in arguments.rows:
        rate = best_rate(row, arguments.rates, found)
        seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + arguments.seeds)
        runs = [found[Run(row, rate, seed).key] for seed in seeds]
        values = torch.tensor([run["perplexity"] for run in runs], dtype=torch.float64)
        spread = f" ± {values.std().item():.2f}" if len(runs) > 1 else ""
        sent = f"{runs[0]['bytes'] / MIB:.2f} MB"
        table.add_row(row, f"{values.mean().item():.2f}{spread}", sent, f"{rate:g}")
    if arguments.markdown:
        print(markdown(table), flush=True)
    else:
        Console(width=None if Console().is_terminal else 110).print(table)


def spawned(worker: int, world_size: int, meeting: str, arguments: argparse.Namespace) -> None:
    """One worker of a run that torchrun has not started."""
    os.environ.update(RANK=str(worker), WORLD_SIZE=str(world_size))
    with join_workers(f"file://{meeting}") as workers:
        run_all(workers, arguments)


def main(command_line: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=4, help="processes (default: 4)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings each (default: 3)")
    parser.add_argument("--epochs", type=int, help=f"default: {SETTINGS.epochs}")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="of one worker")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--resume", action="store_true", help="go on from what was saved")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--output", type=Path, default=Path("results"), help="where to save")
    arguments = parser.parse_args(command_line)
    with tempfile.TemporaryDirectory() as folder:
        given = (arguments.workers, f"{folder}/meeting-point", arguments)
        start_workers(spawned, given, arguments.workers)


if __name__ == "__main__":
    main()
