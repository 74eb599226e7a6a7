"""Trains with differential privacy and compression together, on real data, with four workers.

    python examples/private_training.py

Each worker clips the gradients of its own records, adds noise, and only then compresses what it
sends. The table has the accuracy that is reached with several amounts of noise, compressors, and
with and without error feedback; beside each row is the ε against whoever sees all messages (δ =
1e-5). `--full` has all compressors, three seeds with standard deviations, and looks for settings in
which compression *improves* private training, as arXiv 2211.00734 claims: other batch sizes, few
steps, subspaces that are drawn anew in each step, a learning rate that is not tuned. Results (JSON)
and a plot are saved.

The learning rate of each row is tuned on images that are neither trained nor tested on, and that
are taken to be public: what tuning on private records gives away is not counted in ε.

The workers of a training share one process, in lockstep: bytes and arithmetic are those of real
workers, up to the order in which an all-reduce adds. `make_worker` has all that private training
needs; in the loop of `train`, `optimizer.step()` takes the place of `step_together`.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from opacus import GradSampleModule
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from efsgd import ErrorFeedbackSGD, PowerSGD, TopK
from efsgd.compressors import Identity
from efsgd.privacy import PrivateOptimizer, poisson_batches
from efsgd.testing import step_together
from examples.data import digits
from examples.private_results import DELTA, accuracy_table, plot_accuracy
from examples.private_tuning import NONE, RECORDS, Case, Outcome, Trial, Tuning
from examples.reporting import markdown, save_json

WORKERS, MAX_GRAD_NORM = 4, 1.0
NOISES, BATCH_SIZE = (0.0, 1.0, 4.0), 128
NOISELESS_LR = 4.0  # the best one without noise
# With PowerSGD(rank) an ErrorFeedbackSGD is the PowerSGDOptimizer of that rank.
COMPRESSORS = {
    NONE: Identity(),
    **{f"Rank {rank}": PowerSGD(rank) for rank in (1, 2, 4)},
    "Top-K 5 %": TopK(density=0.05),
    **{f"Rank {rank}, drawn anew": PowerSGD(rank, warm_start=False) for rank in (1, 4)},
}


@cache
def load() -> dict[str, tuple[Tensor, Tensor]]:
    """Images, float32 [images, 64], and labels of the training, validation and test parts.

    Pixels are scaled by constants: a mean over the records would need noise of its own.
    """
    data = digits.load()
    images, labels = data.train_images.flatten(1) / 8.0 - 1.0, data.train_labels
    return {
        "training": (images[:RECORDS], labels[:RECORDS]),
        "validation": (images[RECORDS:], labels[RECORDS:]),
        "test": (data.test_images.flatten(1) / 8.0 - 1.0, data.test_labels),
    }


def make_worker(
    trial: Trial, worker: int
) -> tuple[nn.Module, PrivateOptimizer, DataLoader[tuple[Tensor, Tensor]]]:
    """What a worker of private training needs: model, optimizer and batches.

    Noise and batches are seeded, so that figures can be repeated. Where records are to be protected
    leave out both generators.
    """
    case, (images, labels) = trial.case, load()["training"]
    shard = TensorDataset(images[worker::WORKERS], labels[worker::WORKERS])
    noise, sampling = (
        torch.Generator().manual_seed(1_000 * trial.seed + 10 * worker + use) for use in (1, 2)
    )
    compressor: Any = COMPRESSORS[case.compression]
    if isinstance(compressor, PowerSGD):
        compressor = replace(compressor, seed=trial.seed)

    torch.manual_seed(trial.seed)  # all workers start equal
    model = GradSampleModule(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    optimizer = PrivateOptimizer(
        ErrorFeedbackSGD(
            model.parameters(), lr=trial.lr, momentum_form="sgd", compressor=compressor,
            error_feedback=case.error_feedback,
        ),
        noise_multiplier=case.noise_multiplier, max_grad_norm=MAX_GRAD_NORM,
        expected_batch_size=case.batch_size, sample_rate=case.sample_rate,
        module=model, generator=noise,
    )  # fmt: skip
    batches = poisson_batches(shard, case.sample_rate, case.steps, generator=sampling)
    return model, optimizer, batches


def train(trial: Trial) -> Outcome:
    """One training of all workers, tested a few times."""
    workers = [make_worker(trial, worker) for worker in range(WORKERS)]
    optimizers = [optimizer for _, optimizer, _ in workers]
    outcome = Outcome(trial)
    with warnings.catch_warnings():
        # Opacus's hooks are on layers whose inputs are images.
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        for step, batches in enumerate(zip(*(loader for *_, loader in workers), strict=True), 1):
            for (model, optimizer, _), (images, labels) in zip(workers, batches, strict=True):
                optimizer.zero_grad()
                cross_entropy(model(images), labels).backward()
            step_together(optimizers)  # among real workers each calls optimizer.step()
            if step in trial.case.tested_at():
                stats = optimizers[0].communication_stats()
                sent = stats["total_bytes_sent"] - stats["check_bytes_sent"]
                outcome.add(step, sent, *_accuracies(workers[0][0]))
    return outcome


@torch.no_grad()
def _accuracies(model: nn.Module) -> Iterator[float]:
    """On the validation and on the test part, in percent."""
    for part in ("validation", "test"):
        images, labels = load()[part]
        yield 100 * float((model(images).argmax(dim=1) == labels).float().mean())


def grid(
    noises: Sequence[float], compressions: Sequence[str], batch_size: int, steps: int
) -> list[Case]:
    """All combinations, with and without error feedback; first of each noise no compression."""
    return [
        Case(noise, compression, has_feedback, batch_size, steps)
        for noise in noises
        for compression in (NONE, *compressions)
        for has_feedback in ((True,) if compression == NONE else (True, False))
    ]


def parts(arguments: argparse.Namespace) -> dict[str, list[Case]]:
    """The tables that the command line asks for, by title; the first one is also plotted."""
    noises, steps = arguments.noises, arguments.steps
    title = f"Digits: {BATCH_SIZE} records in a step, {steps} steps"
    if not arguments.full:
        rows = grid(noises, arguments.compressions, BATCH_SIZE, steps)
        return {title: [replace(case, given_lr=arguments.lr) for case in rows]}
    usual = ["Rank 1", "Rank 2", "Rank 4", "Top-K 5 %"]
    found = {title: grid(noises, usual, BATCH_SIZE, steps)}
    # Where does compression improve private training?
    noisy = [noise for noise in noises if noise > 0]
    for batch_size in (BATCH_SIZE // 4, BATCH_SIZE * 4):
        name = f"{batch_size} records in a step, {steps} steps"
        found[name] = grid(noisy, ["Rank 1"], batch_size, steps)
    few = max(1, steps // 8)
    name = f"{BATCH_SIZE} records in a step, only {few} steps"
    found[name] = grid(noisy, ["Rank 1", "Rank 4", "Top-K 5 %"], BATCH_SIZE, few)
    name = f"Subspaces drawn anew: {BATCH_SIZE} records in a step, {steps} steps"
    found[name] = grid(noisy, ["Rank 1, drawn anew"], BATCH_SIZE, steps)
    name = f"Learning rate not tuned: {BATCH_SIZE} records in a step, {steps} steps"
    rows = grid(noisy, usual, BATCH_SIZE, steps)
    found[name] = [replace(case, given_lr=NOISELESS_LR) for case in rows]
    return found


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or these words of one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all rows, three seeds, and the search")
    parser.add_argument("--seeds", type=int, help="trainings each (default: 1, with --full 3)")
    parser.add_argument(
        "--compressions", nargs="+", choices=list(COMPRESSORS), default=["Rank 1", "Top-K 5 %"],
        metavar="NAME", help="without --full: other rows, for example 'Rank 2' 'Rank 4'",
    )  # fmt: skip
    parser.add_argument("--lr", type=float, help="without --full: not tuned, but this one")
    parser.add_argument("--noises", type=float, nargs="+", default=NOISES, help="σ of the rows")
    parser.add_argument("--steps", type=int, default=120, help="of most trainings (default: 120)")
    parser.add_argument("--processes", type=int, default=2, help="train at once (default: 2)")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="directory for results"
    )
    return parser.parse_args(words)


def main(arguments: argparse.Namespace, chosen: Mapping[str, Sequence[Case]]) -> None:
    """Trains, and shows and saves what came of it, table by table."""
    started = time.monotonic()
    console = Console(width=None if Console().is_terminal else 110)
    seeds = arguments.seeds or (3 if arguments.full else 1)
    path = arguments.output / "private_training"
    with Tuning(train, seeds, arguments.processes) as tuning:
        for number, (title, cases) in enumerate(chosen.items()):
            results = tuning.run(cases, title)
            table = accuracy_table(title, results)
            if arguments.markdown:
                print(markdown(table), flush=True)
            else:
                console.print(table, end="\n\n")
            if number == 0:
                plot_accuracy(path.with_suffix(".png"), results)
            about = f"{WORKERS} workers, {seeds} seeds, δ = {DELTA}"
            save_json(
                path.with_suffix(".json"), {"about": about, "runs": [*tuning.outcomes.values()]}
            )
    seconds = time.monotonic() - started
    console.print(f"{about}, torch {torch.__version__}, {seconds:.0f} s in all")
    console.print(f"saved {path}.json and {path}.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = parse_arguments()
    main(arguments, parts(arguments))
