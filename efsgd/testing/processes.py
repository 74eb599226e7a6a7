"""Compressors in real worker processes of this machine, compared with lockstep."""

import pickle
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from efsgd.compressors import Compressor
from efsgd.testing.process_worker import (
    Course,
    dtype_of,
    error_file,
    gradients_of,
    result_file,
    work,
)
from efsgd.testing.simulation import first_difference
from efsgd.testing.trial import SHAPES, Trial, law
from efsgd.testing.violations import CompressorLawError, Violation

#: Seconds for a launch, of which loading torch takes most, and for each compressor in it.
LIMIT, LIMIT_EACH = 90.0, 10.0


#: More than two workers are added in another order than in lockstep: rounding of float64, 2e-16,
#: multiplied by what error feedback makes of it in a few steps.
TOLERANCE = 1e-6


_REMEDY = (
    "In a process of its own a compressor has nothing but its fields, what it has received and "
    "what it draws; and a buffer in flight belongs to its collective."
)


@law
def agrees_in_processes(trial: Trial) -> None:
    """Real worker processes compute what lockstep computes, over a torch.distributed group.

    To the bit for two of them. With more, a process group may add in another order than lockstep:
    then, in float64, to 1e-6 of the largest value.
    """
    for failure in failures([trial]) if trial.processes > 0 else ():
        raise failure


def check_in_processes(
    compressors: Sequence[Compressor],
    *,
    processes: int = 2,
    shapes: Sequence[Sequence[int]] = SHAPES,
    steps: int = 4,
    seed: int = 0,
    error_feedback: bool = True,
) -> None:
    """Tests the law `agrees_in_processes` for several compressors, in one launch of processes.

    Args:
        compressors: are pickled; their classes must be at the top of modules.
        processes: the number of workers, over gloo.
        shapes: of the parameters.
        steps: of each run.
        seed: of all gradients.
        error_feedback: whether what was not sent is kept.

    Raises:
        CompressorLawError: names the compressor, and what differs.
        ValueError: an argument is out of range.
    """
    if processes < 1:
        raise ValueError(f"Invalid processes: {processes!r}. Must be at least 1.")
    own = (processes,), shapes, steps, seed, processes, error_feedback
    for failure in failures([Trial(compressor, *own) for compressor in compressors]):
        raise failure


def failures(trials: Sequence[Trial]) -> list[CompressorLawError]:
    """Starts worker processes, and says for each trial what is wrong, if anything is.

    Args:
        trials: all with as many processes, at least one.

    Raises:
        CompressorLawError: a compressor cannot be pickled, or fails in lockstep already.
    """
    found: list[CompressorLawError] = []
    if not trials:
        return found
    packed = [_pickled(trial) for trial in trials]
    limit = LIMIT + LIMIT_EACH * len(trials)
    deadline = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _launched(trials[0].processes, folder, packed) as workers:
            expected = [_in_lockstep(trial) for trial in trials]  # while they load torch
            for worker in workers:
                worker.join(max(0.0, deadline - time.monotonic()))
            late = f"has not finished within {limit:g} seconds"
            codes = [worker.exitcode for worker in workers]
            states = [late if code is None else f"has exit code {code}" for code in codes]
        for number, trial in enumerate(trials):
            try:
                courses = _results(folder, number, trial, states)
                for worker, course in enumerate(courses):
                    _compare(trial, worker, course, expected[number][worker])
            except CompressorLawError as error:
                found.append(error)
    return found


def _blame(trial: Trial, found: str, remedy: str = _REMEDY) -> CompressorLawError:
    violation = Violation(found, remedy)
    return CompressorLawError(agrees_in_processes.__name__, trial.compressor, violation)


def _pickled(trial: Trial) -> bytes:
    try:
        return pickle.dumps(trial)
    except Exception as error:
        raise _blame(
            trial,
            f"it cannot be pickled for worker processes ({type(error).__name__}: {error})",
            "Define its class at the top of a module and keep functions and other local things out "
            "of its fields; or pass processes=0.",
        ) from error


@contextmanager
def _launched(count: int, folder: Path, packed: Sequence[bytes]) -> Iterator[list[Any]]:
    """Worker processes, which end with this context in any case."""
    context = torch.multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=work, args=(worker, count, str(folder), packed), daemon=True)
        for worker in range(count)
    ]
    try:
        for worker in workers:
            worker.start()
        yield workers
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join()


def _in_lockstep(trial: Trial) -> list[Course]:
    """What each worker should find."""
    workers = trial.simulate(trial.processes, dtype_of(trial))
    courses: list[Course] = [[] for _ in range(trial.processes)]
    try:
        for step in range(trial.steps):
            workers.step(gradients_of(trial, step))
            for course, found in zip(courses, workers.snapshots(), strict=True):
                course.append(found)
    except Violation as violation:
        raise _blame(trial, violation.found, violation.remedy) from violation.__cause__
    return courses


def _results(folder: Path, number: int, trial: Trial, states: Sequence[str]) -> list[Course]:
    """What each worker has found; an error where one has not."""
    files = [result_file(folder, number, worker) for worker in range(trial.processes)]
    if all(file.exists() for file in files):
        return [torch.load(file, weights_only=True) for file in files]
    errors = [error_file(folder, worker) for worker in range(trial.processes)]
    texts = [
        f"worker {worker}: {file.read_text()}" if file.exists() else f"worker {worker} {state}"
        for worker, (file, state) in enumerate(zip(errors, states, strict=True))
    ]
    raise _blame(trial, f"of {trial.processes} worker processes not all finished: {texts}")


def _compare(trial: Trial, worker: int, found: Course, expected: Course) -> None:
    for step, (own, other) in enumerate(zip(found, expected, strict=True)):
        name = first_difference(own, other)
        if name is None or (trial.processes > 2 and _is_close(own, other)):
            continue
        raise _blame(
            trial,
            f"after step {step}, {name} on worker {worker} of {trial.processes} processes is not "
            f"what it is in lockstep",
        )


def _is_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    for name, value in expected.items():
        own = found.get(name)
        if own is None or own.shape != value.shape:
            return False
        difference, largest = (own.double() - value.double()).abs(), value.double().abs()
        if value.numel() and not difference.max() <= TOLERANCE * max(1.0, float(largest.max())):
            return False
    return True
