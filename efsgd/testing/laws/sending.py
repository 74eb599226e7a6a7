"""Laws of what is handed to collectives."""

import inspect
import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch

from efsgd.testing.trial import Trial, law
from efsgd.testing.violations import Violation
from efsgd.wire.control_words import ControlWords
from efsgd.wire.lockstep import Traced


@law(
    "payload_bytes must announce what one worker hands to all collectives of a step, uncompressed "
    "tensors included, and control words left out."
)
def sends_what_it_announces(trial: Trial) -> None:
    """What a step hands to collectives has as many bytes as `payload_bytes` announces.

    Counted from the buffers themselves, for float32 and float64, for all tensors together, in each
    step. One word for each parameter and each worker comes in addition. Where bytes depend on the
    number of workers, `payload_bytes` takes it as `world_size`.
    """
    for world_size in trial.world_sizes:
        for dtype in (torch.float32, torch.float64):
            found = _miscounted(trial, trial.shapes, world_size, dtype)
            if found is None:
                continue
            for shape in trial.shapes:  # a single shape says more than all of them
                own = _miscounted(trial, [shape], world_size, dtype) if math.prod(shape) else None
                if own is not None:
                    raise Violation(own)
            raise Violation(found)


def _miscounted(
    trial: Trial, shapes: Sequence[Sequence[int]], world_size: int, dtype: torch.dtype
) -> str | None:
    """What differs from what was announced, if anything does."""
    workers = trial.simulate(world_size, dtype, shapes)
    words = ControlWords.count(len(shapes), world_size) * dtype.itemsize
    announce: Any = trial.compressor.payload_bytes
    asks = "world_size" in inspect.signature(announce).parameters
    options = {"world_size": world_size} if asks else {}
    for step in range(trial.steps):
        scene, _, trace = workers.take(step, kinds=["gaussian"])
        sent = sum(traced.nbytes for traced in trace) - words
        announced = announce(shapes, dtype, step, **options)
        if sent != announced:
            return f"{scene} sent {sent} bytes for shapes {list(shapes)}, announced are {announced}"
    return None


@law(
    "The size of a payload may depend on shapes and settings, not on data. Where steps differ, "
    "`step_kind` must tell them apart."
)
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
                scene, _, trace = workers.take(step, kinds=[kind], scale=scale)
                what, asked = f"{scene}, of {kind} gradients times {scale:g},", requests(trace)
                other, expected = known.setdefault(step_kind, (what, asked))
                if asked != expected:
                    raise Violation(
                        f"{what} asked for {asked}, and {other} for {expected}, both of kind "
                        f"{step_kind!r}"
                    )


def requests(trace: Sequence[Traced]) -> list[str]:
    """What was asked for, without purposes."""
    return [f"{t.kind} of {list(t.shape)} {t.dtype}".replace("torch.", "") for t in trace]
