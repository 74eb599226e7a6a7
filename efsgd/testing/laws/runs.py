"""Laws of whole runs: the same again, after a refused step, from a checkpoint, without a group."""

import copy
import random
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist

from efsgd.testing.gradients import Gradients
from efsgd.testing.laws.sending import requests
from efsgd.testing.simulation import Simulation, require_equal
from efsgd.testing.trial import Trial, law
from efsgd.testing.violations import Violation
from efsgd.wire.collectives import run
from efsgd.wire.transports import Alone


@law(
    "All that is random must come from the seed, the parameter's index, the step and the worker: "
    "draw from draws.shared() or draws.private(); data and dropout must not depend on how "
    "gradients are compressed."
)
def repeats_to_the_bit(trial: Trial) -> None:
    """The same run twice gives the same to the bit, and no global generator is touched.

    Neither torch's, whose state is another one in the second run, nor random's, nor NumPy's.
    """
    ends = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # leaves those of devices alone
            before = _generators()
            workers = trial.simulate(trial.several)
            for step in range(trial.steps):
                workers.take(step, with_missing=True)
            for name, state in _generators().items():
                if state != before[name]:
                    raise Violation(f"a run draws from the global generator of {name}")
            ends.append(workers.snapshots())
    require_equal(ends[1], ends[0], "after the same run with another global seed")


def _generators() -> dict[str, Any]:
    """The states of global generators, by whose they are."""
    found: dict[str, Any] = {"torch": torch.get_rng_state().tolist(), "random": random.getstate()}
    if "numpy" in sys.modules:
        state = sys.modules["numpy"].random.get_state()
        found["numpy"] = [state[1].tolist(), *state[2:]]
    return found


@law(
    "What is kept from step to step must change in the aggregator's `commit_` alone, and "
    "`shows_nonfinite` be True only if its first buffer shows every NaN and infinity; what is "
    "asked for must not depend on data."
)
def refuses_without_a_trace(trial: Trial) -> None:
    """A step that is refused, as one worker has a NaN or infinity, asks for the same and is undone.

    In whichever parameter it is, and in steps of every kind: parameters and state are bitwise what
    they were, on all workers, and the steps after it are those of a run in which it never was.
    """
    steps = max(trial.steps, 1 + max(trial.first_steps()))
    for world_size in trial.fewest_and_most:
        workers, others = (trial.simulate(world_size, nonfinite="skip") for _ in range(2))
        positions = [n for n, p in enumerate(workers.parameters) if p.numel() > 0]
        for step in range(steps):
            own = workers.gradients(step, kinds=["gaussian"])
            is_thorough = step == min(1, steps - 1)
            tried = positions if is_thorough else [positions[step % len(positions)]]
            refused = [_refuse(workers, own, position) for position in tried]
            expected, _ = requests(workers.step(own)), others.step(own)
            for asked in refused:
                if asked != expected:
                    raise Violation(
                        f"with {world_size} workers a refused step asked for {asked}, and the "
                        f"same step, when it was not refused, for {expected}"
                    )
        when = f"at the end of {steps} steps, each of them once refused"
        require_equal(workers.snapshots(), others.snapshots(), when)


def _refuse(workers: Simulation, own: Gradients, position: int) -> list[str]:
    """What a step asks for that is refused, and changes nothing."""
    value = (torch.nan, torch.inf, -torch.inf)[position % 3]
    bad = copy.deepcopy(own)
    gradient = bad[-1][position]
    assert gradient is not None
    gradient.view(-1)[-1] = value
    before, count = workers.snapshots(), workers.optimizers[0].communication_stats()
    what = f"{workers.scene}, with {value} in parameter {position}'s gradient on the last worker,"
    asked = requests(workers.step(bad))
    if workers.optimizers[0].communication_stats()["skipped_steps"] == count["skipped_steps"]:
        raise Violation(f"{what} is not refused")
    require_equal(workers.snapshots(), before, f"after {what} which is refused")
    return asked


@law(
    "What is kept from step to step must be in the aggregator's `state`, from where it is saved, "
    "or be computed from the number of the step."
)
def resumes_to_the_bit(trial: Trial) -> None:
    """From a copy of parameters and `state_dict` a run continues as if it was not interrupted.

    To the bit, with momentum, each worker with its own `state_dict`.
    """
    options: dict[str, Any] = {"momentum": 0.9, "lr": 0.1}
    for world_size in sorted({min(trial.world_sizes), trial.several}):
        workers, resumed = (trial.simulate(world_size, **options) for _ in range(2))
        for step in range(2):
            workers.take(step)
        for worker, (old, new) in enumerate(
            zip(workers.optimizers, resumed.optimizers, strict=True)
        ):
            pairs = zip(workers.parameters_of(worker), resumed.parameters_of(worker), strict=True)
            for source, target in pairs:
                target.data.copy_(source.data)
            new.load_state_dict(copy.deepcopy(old.state_dict()))
        for step in range(2, 2 + trial.steps):
            workers.take(step)
            resumed.take(step)
            when = f"{step - 1} steps after a state_dict was loaded"
            require_equal(resumed.snapshots(), workers.snapshots(), when)


@law(
    "An answer may be the buffer that was sent, or another: read neither before the answer is "
    "there, and write to neither afterwards."
)
def agrees_when_alone(trial: Trial) -> None:
    """`optimizer.step()` of one worker without a process group is a step of one in lockstep."""
    workers, alone = trial.simulate(1), trial.simulate(1)
    optimizer = alone.optimizers[0]
    has_group = dist.is_available() and dist.is_initialized()
    for step in range(trial.steps):
        _, given, _ = workers.take(step, with_missing=True)
        alone.give_(given)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(optimizer.exchange(), Alone()) if has_group else optimizer.step()
        when = f"after step {step} without a process group, compared with lockstep"
        require_equal(alone.snapshots(), workers.snapshots(), when)
