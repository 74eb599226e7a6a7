"""Compressors in real worker processes of this machine, compared with lockstep."""

import pickle
import tempfile
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_all_start_methods
from torch.multiprocessing.spawn import start_processes

from efsgd.checks import require_integer
from efsgd.compressors import Compressor
from efsgd.testing.gradients import Gradients
from efsgd.testing.simulation import Simulation, first_difference
from efsgd.testing.trial import SHAPES, Trial, law
from efsgd.testing.violations import CompressorLawError, Violation

# How long one worker waits for another, which may have to load torch first.
_PATIENCE = timedelta(seconds=90)

# Where there is a server that forks, workers need not load torch if the program has loaded it.
_START_METHOD = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"

# More than two workers are added in another order than in lockstep: rounding of float64, 2e-16,
# multiplied by what error feedback makes of it in a few steps.
_TOLERANCE = 1e-6


_REMEDY = (
    "In a process of its own a compressor has nothing but its fields, what it has received and "
    "what it draws; and a buffer in flight belongs to its collective."
)


@law(_REMEDY)
def agrees_in_processes(trial: Trial) -> None:
    """Real worker processes compute what lockstep computes, over a torch.distributed group.

    To the bit for two of them. With more, a process group may add in another order than lockstep:
    then, in float64, to 1e-6 of the largest value.
    """
    if trial.processes > 0:
        _require_agreement([trial])


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
        CompressorLawError: names the first compressor that breaks it, and what differs.
        ValueError: an argument is out of range.
    """
    require_integer("processes", processes, 1)
    own = (processes,), shapes, steps, seed, processes, error_feedback
    _require_agreement([Trial(compressor, *own) for compressor in compressors])


def _require_agreement(trials: Sequence[Trial]) -> None:
    """Runs all trials in one launch of processes; raises what is wrong with the first of them."""
    packed = [_packed(trial) for trial in trials]
    with tempfile.TemporaryDirectory() as folder:
        count = trials[0].processes if trials else 0
        try:
            given: Any = count, folder, packed
            start_processes(_work, given, nprocs=count, daemon=True, start_method=_START_METHOD)
        except Exception as error:
            reports = sorted(Path(folder).glob("*.txt"))
            texts = [report.read_text() for report in reports] or [f"{error}"]
            number = int(reports[0].stem.partition("-")[0]) if reports else 0
            raise _blame(trials[min(number, len(trials) - 1)], "; ".join(texts)) from error


def _blame(trial: Trial, found: str, remedy: str = _REMEDY) -> CompressorLawError:
    return CompressorLawError(agrees_in_processes.__name__, trial.compressor, found, remedy)


def _packed(trial: Trial) -> bytes:
    """The trial, and what all workers have after each step in lockstep."""
    try:
        pickle.dumps(trial)
    except Exception as error:
        raise _blame(
            trial,
            f"it cannot be pickled for worker processes ({type(error).__name__}: {error})",
            "Define its class at the top of a module, without local functions in its fields; or "
            "pass processes=0.",
        ) from error
    workers, every_step = _prepare(trial)
    expected = []
    try:
        for made in every_step:
            workers.step(made)
            expected.append(workers.snapshots())
    except Violation as violation:
        raise _blame(trial, violation.found, violation.remedy) from violation.__cause__
    return pickle.dumps((trial, expected))


def _prepare(trial: Trial) -> tuple[Simulation, list[Gradients]]:
    """Workers, and each step's gradients: float64 and of full rank where sums depend on order."""
    is_exact, count = trial.processes <= 2, trial.processes
    options: dict[str, Any] = {} if is_exact else {"kinds": ["gaussian"]}
    workers = trial.simulate(count, torch.float32 if is_exact else torch.float64)
    steps = range(trial.steps)
    return workers, [workers.gradients(step, with_missing=True, **options) for step in steps]


def _work(worker: int, world_size: int, folder: str, packed: Sequence[bytes]) -> None:
    """One worker process: takes part in all trials, and says where it differs from lockstep."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    meeting, number = Path(folder, "store").as_uri(), 0
    try:
        dist.init_process_group(
            "gloo", init_method=meeting, rank=worker, world_size=world_size, timeout=_PATIENCE
        )
        while number < len(packed):
            trial, expected = pickle.loads(packed[number])
            workers, every_step = _prepare(trial)
            for step, made in enumerate(every_step):
                workers.give_(made)
                workers.optimizers[worker].step()
                found, tolerance = workers.snapshot(worker), _TOLERANCE if world_size > 2 else 0.0
                name = first_difference(found, expected[step][worker], tolerance)
                if name is not None:
                    raise AssertionError(f"after step {step}, {name} is not what it is in lockstep")
            number += 1
        dist.barrier()
    except Exception as error:
        text = f"worker {worker} of {world_size} processes: {type(error).__name__}: {error}"
        Path(folder, f"{number:06}-{worker}.txt").write_text(text)
        raise
    dist.destroy_process_group()
