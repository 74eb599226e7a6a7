"""The command line that the two training scripts share, and what they save."""

import argparse
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from examples.checkpointing import Checkpoints
from examples.distributed import Workers
from examples.history import History
from examples.reporting import plot_runs, save_json
from examples.settings import Settings


@dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
        data: a directory with the files of the larger data set; None for the built-in data.
        rank: of the compression; None for torch.optim.SGD under DistributedDataParallel.
        epochs: to train, or None for the task's own number.
        batch_size: per worker and step, or None.
        lr: learning rate of one worker, or None.
        seed: of initialization, data order and dropout.
        output: directory for results.
        checkpoint: directory for checkpoints, or None.
        checkpoint_every: steps from one to the next.
    """

    data: Path | None
    rank: int | None
    epochs: int | None
    batch_size: int | None
    lr: float | None
    seed: int
    output: Path
    checkpoint: Path | None
    checkpoint_every: int

    def override(self, settings: Settings) -> Settings:
        """The task's settings, with what the command line says otherwise."""
        given = {"epochs": self.epochs, "batch_size": self.batch_size, "lr": self.lr}
        return replace(settings, **{k: v for k, v in given.items() if v is not None})

    def checkpoints(self, name: str, settings: Settings, workers: Workers) -> Checkpoints | None:
        """The training's files, if it is to have any; only the same training goes on from them.

        Args:
            name: of the script.
            settings: hyper-parameters.
            workers: the group this worker belongs to.
        """
        if self.checkpoint is None:
            return None
        own = {"data": self.data, "rank": self.rank, "seed": self.seed, **asdict(settings)}
        run = {"script": name, **{key: str(value) for key, value in own.items()}}
        return Checkpoints(self.checkpoint, self.checkpoint_every, workers, run)


def _rank(text: str) -> int | None:
    if text == "none":
        return None
    try:
        rank = int(text)
    except ValueError:
        rank = 0
    if rank < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1, or 'none'")
    return rank


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer of at least 1")
    return int(text)


def parse_arguments(description: str | None, files: str) -> Arguments:
    """Reads the command line.

    Args:
        description: the script's docstring.
        files: what `--data DIR` must hold.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help=f"directory with {files}")
    parser.add_argument(
        "--rank",
        type=_rank,
        default=4,
        help="rank of the compression, or 'none' for torch.optim.SGD under DDP (default: 4)",
    )
    parser.add_argument("--epochs", type=_positive, help="passes over the data")
    parser.add_argument("--batch-size", type=_positive, help="images or streams per worker")
    parser.add_argument("--lr", type=float, help="learning rate of one worker")
    parser.add_argument("--seed", type=int, default=1, help="seed of everything (default: 1)")
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="directory for results"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="directory for checkpoints, all workers' own; training goes on from what is there",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=_positive,
        default=100,
        metavar="STEPS",
        help="steps from one checkpoint to the next (default: 100)",
    )
    return Arguments(**vars(parser.parse_args()))


def save_run(
    name: str, quality: str, history: History, settings: Settings, arguments: Arguments
) -> None:
    """Saves results and a plot, and prints the last figures.

    Args:
        name: of the script, without extension; the files are called by it.
        quality: what quality means.
        history: of the training.
        settings: hyper-parameters.
        arguments: the command line.
    """
    method = "SGD" if arguments.rank is None else f"Rank {arguments.rank}"
    given = {key: str(value) for key, value in vars(arguments).items()}
    content = {"quality": quality, "arguments": given, "settings": settings, "history": history}
    save_json(arguments.output / f"{name}.json", content)
    plot_runs(arguments.output / f"{name}.png", {name: (quality, {method: [history]})})
    sent = history.bytes_per_epoch / 2**20
    print(f"{method}: {quality} {history.quality[-1]:.2f}, {history.steps[-1]} steps,", end=" ")
    print(f"{sent:.3f} MB sent per epoch, {1e3 * history.seconds_per_batch:.1f} ms per batch")
    print(f"saved {arguments.output / name}.json and .png")
