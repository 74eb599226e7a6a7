"""Trains with AdamW on compressed gradients, and logs what compression does for TensorBoard.

    torchrun --standalone --nproc-per-node 2 examples/metrics.py
    tensorboard --logdir results/metrics

For each rank a small CNN learns scikit-learn's digits. Worker 0 writes what `attached.metrics()`
has to event files, where tensorboard is installed, and to a plot: the one in the documentation.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from matplotlib.ticker import NullFormatter, StrMethodFormatter

import efsgd
from examples.builtin import DIGITS, digits_task
from examples.distributed import Workers, join_workers
from examples.reporting import COLORS, MIB, pyplot, save_figure
from examples.training import prepare

Curves = dict[str, list[tuple[int, float]]]
RELATIVE = "efsgd/relative_error"


def train(
    workers: Workers, rank: int, epochs: int, every: int, add_scalar: Callable[..., None]
) -> None:
    """A run, of which every so many steps are logged."""
    prepare(workers, seed=0)
    task, model = digits_task(DIGITS.batch_size, workers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    attached = efsgd.attach(model, optimizer, efsgd.PowerSGD(rank=rank))
    attached.metrics()  # from now on errors are measured
    step = 0
    for epoch in range(epochs):
        for batch in task.batches(0, epoch):
            optimizer.zero_grad()
            loss = task.loss(model, batch)
            loss.backward()
            optimizer.step()
            if step % every == 0:
                add_scalar("loss", loss.item(), step)
                for name, value in attached.metrics(by_layer=True).items():
                    add_scalar(name, value, step)
            step += 1


def writer_of(folder: Path) -> Callable[..., None]:
    """What writes a number to event files, if tensorboard is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed: there are no event files.", file=sys.stderr)
        return lambda *_: None
    return SummaryWriter(folder).add_scalar


def positive(curve: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Steps and values but for zeros: the first error is none, and has no logarithm."""
    kept = [(step, value) for step, value in curve if value > 0]
    return [step for step, _ in kept], [value for _, value in kept]


def plot(path: Path, runs: dict[str, Curves]) -> None:
    """Relative errors of all ranks, those of layers at the lowest, and bytes."""
    figure, (whole, layers, sent) = pyplot.subplots(1, 3, figsize=(12, 3.6))
    for color, (name, curves) in zip(COLORS, runs.items(), strict=False):
        whole.plot(*positive(curves[RELATIVE]), color=color, label=name)
        steps, totals = zip(*curves["efsgd/total_bytes_sent"], strict=True)
        sent.plot(steps, [total / MIB for total in totals], color=color, label=name)
    first, curves = next(iter(runs.items()))
    names = [name for name in curves if name.startswith(f"{RELATIVE}/")]
    for color, name in zip(COLORS, names, strict=False):
        layers.plot(*positive(curves[name]), color=color, label=name.split("/")[-1])
    titles = "relative error ‖e‖/‖g‖", f"the same by layer, {first}", "sent in all, MiB"
    for axes, title in zip((whole, layers, sent), titles, strict=True):
        axes.set(title=title, xlabel="step", yscale="linear" if axes is sent else "log")
        axes.legend(fontsize="small")
    for axes in (whole, layers):
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    save_figure(path, figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--every", type=int, default=5, help="steps between two that are logged")
    parser.add_argument("--output", type=Path, default=Path("results"))
    given = parser.parse_args(arguments)
    runs: dict[str, Curves] = {}
    with join_workers() as workers:
        for rank in given.ranks:
            name, curves = f"rank {rank}", defaultdict[str, list[tuple[int, float]]](list)
            own = given.output / "metrics" / name.replace(" ", "-")
            write = writer_of(own) if workers.is_first else None

            def add_scalar(
                tag: str,
                value: float,
                step: int,
                write: Callable[..., None] | None = write,
                curves: Curves = curves,
            ) -> None:
                if write is not None:
                    write(tag, value, step)
                    curves[tag].append((step, value))

            train(workers, rank, given.epochs, given.every, add_scalar)
            runs[name] = curves
        if workers.is_first:
            plot(given.output / "metrics.png", runs)


if __name__ == "__main__":
    main()
