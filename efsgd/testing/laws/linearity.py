"""The law of linearity, on which an average of what is compressed relies."""

from collections.abc import Sequence

import torch
from torch import Tensor

from efsgd.compressors import Compressor
from efsgd.testing.gradients import KINDS, gradients
from efsgd.testing.senders import Kept, exchange, senders
from efsgd.testing.simulation import largest
from efsgd.testing.trial import Trial, law
from efsgd.testing.violations import Violation

# Of the largest number in any tensor, in float64: 2e-16 for each of some dozen sums, and what
# orthogonalizing columns that nearly depend on each other makes of it.
TOLERANCE = 1e-10

# Another sign and no power of two; far beyond what float32 holds of squares.
SCALES = (-3.0, 1e-20, 1e20)


@law(
    "Do not claim to be linear where elements are chosen by their size, rounded, or reduced to "
    "signs, nor where workers draw numbers of their own. Where only some kinds of steps are "
    "linear, claim linear=frozenset({kinds})."
)
def is_linear_as_claimed(trial: Trial) -> None:
    """Where `claims().linear`, only the mean of what is compressed matters, and all scales with it.

    From equal shared state, workers that compress Δ_w get what one worker gets that compresses
    their mean, for each number of workers; and c times as much where they compress c·Δ_w, for c
    below zero and from 1e-20 to 1e+20. To 1e-10 of the largest value, in float64.

    In each step gradients of all kinds are tried, and then gaussian ones, from whose results the
    next step starts. (Others may leave columns that are zero but for rounding, and what the next
    step makes of these may be anything.) Steps of kinds for which it is not claimed are taken
    without being compared, and all go on from the same result.
    """
    if not trial.compressor.claims().linear or not trial.compressed_shapes():
        return
    for world_size in trial.world_sizes:
        if world_size > 1:
            _compare(trial, world_size, None)
    for scale in SCALES:
        _compare(trial, min(trial.world_sizes), scale)


def _compare(trial: Trial, world_size: int, scale: float | None) -> None:
    """Workers, with one that has their mean, or with as many that have `scale` times as much."""
    compressor, settings = trial.compressor, dict(trial.simulate(1).group)
    ours, others = senders(trial, world_size), senders(trial, 1 if scale is None else world_size)
    what = "what one gets of their mean"
    if scale is not None:
        what = f"what they get of {scale:g} times as much, divided by {scale:g}"
    for step in range(max(trial.steps, 1 + max(trial.first_steps()))):
        is_claimed = compressor.claims().is_linear_in(compressor.step_kind(step, settings))
        for kinds in (KINDS, ["gaussian"]):
            made = gradients(trial.shapes, world_size, step, trial.seed, kinds=kinds)
            deltas = [[delta for delta in own if delta is not None] for own in made]
            changed = [_mean(deltas)] if scale is None else _scaled(deltas, scale)
            found, expected = exchange(ours, step, deltas), exchange(others, step, changed)
            greatest = max(largest(delta) for own in deltas for delta in own)
            wrong = largest(found[0].received - expected[0].received / (scale or 1.0))
            if is_claimed and not wrong <= TOLERANCE * greatest:
                raise Violation(
                    f"in step {step} with {world_size} workers, what they get differs by "
                    f"{wrong:.3g} from {what}, with values up to {greatest:.3g}"
                )
        for sender, outcome in zip([*ours, *others], [*found, *expected], strict=True):
            sender.keep_(outcome.kept)
            if not is_claimed:
                sender.keep_(_shared(compressor, expected[0].kept))


def _mean(deltas: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(own).mean(0) for own in zip(*deltas, strict=True)]


def _scaled(deltas: Sequence[Sequence[Tensor]], scale: float) -> list[list[Tensor]]:
    return [[scale * delta for delta in own] for own in deltas]


def _shared(compressor: Compressor, kept: Kept) -> Kept:
    """Without what is each worker's own."""
    return {key: value for key, value in kept.items() if key[1] not in compressor.local_state}
