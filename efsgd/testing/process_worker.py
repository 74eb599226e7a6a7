"""What a worker process does for `efsgd.testing.processes`."""

import os
import pickle
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from efsgd.testing.gradients import Gradients
from efsgd.testing.simulation import give_, snapshot
from efsgd.testing.trial import Trial

#: All that a step may change on one worker, after each step.
Course: TypeAlias = list[dict[str, Tensor]]


#: How long one worker waits for another.
PATIENCE = timedelta(seconds=30)


def result_file(folder: Path, number: int, worker: int) -> Path:
    """Where a worker writes the course of one trial."""
    return folder / f"{number}-{worker}.pt"


def error_file(folder: Path, worker: int) -> Path:
    """Where a worker writes why it has stopped."""
    return folder / f"{worker}.txt"


def dtype_of(trial: Trial) -> torch.dtype:
    """Of the parameters: where sums depend on their order, that with more digits."""
    return torch.float32 if trial.processes <= 2 else torch.float64


def gradients_of(trial: Trial, step: int) -> Gradients:
    """All workers' gradients; where sums depend on their order, of full rank alone."""
    kinds = {"kinds": ["gaussian"]} if trial.processes > 2 else {}
    return trial.gradients(trial.processes, step, with_missing=True, **kinds)


def work(worker: int, world_size: int, name: str, packed: Sequence[bytes]) -> None:
    """Takes part in all trials, one after the other.

    Args:
        worker: this worker.
        world_size: the number of workers.
        name: of the folder where they meet, and where results are written.
        packed: the trials, pickled.
    """
    torch.set_num_threads(1)
    folder = Path(name)
    try:
        meeting = (folder / "store").as_uri()
        dist.init_process_group(
            "gloo", init_method=meeting, rank=worker, world_size=world_size, timeout=PATIENCE
        )
        for number, data in enumerate(packed):
            course = _take_part(pickle.loads(data), worker)
            file = result_file(folder, number, worker)
            torch.save(course, file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
        dist.barrier()
    except BaseException as error:
        error_file(folder, worker).write_text(f"{type(error).__name__}: {error}")
        os._exit(1)  # the others notice at once
    dist.destroy_process_group()


def _take_part(trial: Trial, worker: int) -> Course:
    """One worker's part of a trial."""
    optimizer = trial.simulate(1, dtype_of(trial)).optimizers[0]
    course: Course = []
    for step in range(trial.steps):
        give_(optimizer, gradients_of(trial, step)[worker])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        course.append(snapshot(optimizer))
    return course
