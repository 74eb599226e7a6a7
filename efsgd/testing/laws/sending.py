"""Laws of what is handed to collectives."""

import inspect
import math
from collections.abc import Callable, Hashable, Sequence

import torch

from efsgd.compressors import Compressor
from efsgd.testing.gradients import gradients
from efsgd.testing.lockstep import Traced
from efsgd.testing.trial import Trial, law
from efsgd.testing.violations import Violation
from efsgd.wire.control_words import ControlWords


@law
def sends_what_it_announces(trial: Trial) -> None:
    """What a step hands to collectives has as many bytes as `payload_bytes` announces.

    Counted from the buffers themselves, for float32 and float64, for all tensors together, in each
    step. One word for each parameter and each worker comes in addition. Where bytes depend on the
    number of workers, `payload_bytes` takes it as `world_size`.
    """
    for world_size in trial.world_sizes:
        for dtype in (torch.float32, torch.float64):
            if _counted(trial, trial.shapes, world_size, dtype) is None:
                continue
            alone: list[Sequence[Sequence[int]]] = [[s] for s in trial.shapes if math.prod(s) > 0]
            for shapes in [*alone, trial.shapes]:  # a single shape says more than all of them
                if found := _counted(trial, shapes, world_size, dtype):
                    raise Violation(
                        found,
                        "payload_bytes must announce what one worker hands to all collectives of "
                        "a step, uncompressed tensors included, and control words left out.",
                    )


def _counted(
    trial: Trial, shapes: Sequence[Sequence[int]], world_size: int, dtype: torch.dtype
) -> str | None:
    """What differs from what was announced, if anything does."""
    workers = trial.simulate(world_size, dtype, shapes)
    for step in range(trial.steps):
        scene = workers.scene
        trace = workers.step(gradients(shapes, world_size, step, trial.seed, kinds=["gaussian"]))
        words = ControlWords.count(len(shapes), world_size) * dtype.itemsize
        sent = sum(traced.nbytes for traced in trace) - words
        announced = _announced(trial.compressor, shapes, dtype, step, world_size)
        if sent != announced:
            return f"{scene} sent {sent} bytes for shapes {list(shapes)}, announced are {announced}"
    return None


def _announced(
    compressor: Compressor,
    shapes: Sequence[Sequence[int]],
    dtype: torch.dtype,
    step: int,
    world_size: int,
) -> int:
    """By a `payload_bytes` that may ask for the number of workers, too, where that matters."""
    announce: Callable[..., int] = compressor.payload_bytes
    asks = "world_size" in inspect.signature(announce).parameters
    return announce(shapes, dtype, step, **({"world_size": world_size} if asks else {}))


@law
def has_one_schedule(trial: Trial) -> None:
    """What a step asks for (kinds, sizes and dtypes of collectives, in order) depends on its kind.

    Not on the data: it is the same for gaussian, zero, one-hot and huge gradients, and in all steps
    whose `step_kind` is equal.
    """
    cases = [("gaussian", 1.0), ("zero", 1.0), ("one_hot", 1.0), ("gaussian", 1e30)]
    for world_size in trial.fewest_and_most:
        known: dict[Hashable, tuple[str, list[str]]] = {}
        for kind, scale in cases:
            workers = trial.simulate(world_size, torch.float32, nonfinite="skip")
            for step in range(trial.steps):
                step_kind = trial.compressor.step_kind(workers.group["step"], dict(workers.group))
                what = f"{workers.scene}, of {kind} gradients times {scale:g},"
                own = trial.gradients(world_size, step, kinds=[kind], scale=scale)
                asked = requests(workers.step(own))
                other, expected = known.setdefault(step_kind, (what, asked))
                if asked != expected:
                    raise Violation(
                        f"{what} asked for {asked}, and {other} for {expected}",
                        f"Both steps are of kind {step_kind!r}. The size of a payload may depend "
                        f"on shapes and settings, not on data. Where steps are not all alike, "
                        f"`step_kind` must tell them apart.",
                    )


def requests(trace: Sequence[Traced]) -> list[str]:
    """What was asked for, without purposes."""
    return [f"{t.kind} of {list(t.shape)} {t.dtype}".replace("torch.", "") for t in trace]
