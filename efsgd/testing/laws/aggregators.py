"""Laws of one step's exchange, looked at from inside: what is sent, and what comes of it."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.layout import Blocks
from efsgd.testing.gradients import made_up
from efsgd.testing.lockstep import lockstep
from efsgd.testing.simulation import Simulation
from efsgd.testing.trial import Trial, law
from efsgd.testing.violations import Violation
from efsgd.wire.collectives import Exchange

# What is lost to rounding in float64: 2e-16 for each of some dozen sums.
TOLERANCE = 1e-10


# What may be missing of a tensor that is sent as it is: payloads may have numbers in float32.
ROUNDING = 1e-6


#: Steps among which others of the same kind are looked for, and how many of them are tried.
HORIZON = 256


TRIED, TRIED_AT_RANDOM = 6, 32


_GATHERS = ("AllGather", "AllToAll")


@law
def averages_what_is_sent(trial: Trial) -> None:
    """What all workers get is the mean of what each of them has sent.

    That is, of what each worker itself subtracts for it, where it keeps an error. To 1e-10 in
    float64, in a step of every kind, with error feedback and without.
    """
    for world_size in trial.fewest_and_most:
        workers = _started(trial, world_size)
        for step in trial.first_steps():
            for buckets in _sections(workers):
                found = _exchange(buckets, step, trial.seed)
                sent = torch.stack([each.sent for each in found]).mean(0)
                largest = max(_largest(each.sent) for each in found)
                wrong = max(_largest(each.received - sent) for each in found)
                if not wrong <= TOLERANCE * largest:
                    raise Violation(
                        f"in step {step} with {world_size} workers, what they get differs by "
                        f"{wrong:.3g} from the mean of what each has sent, beside values up to "
                        f"{largest:.3g}",
                        "With `averages`, `decompress` must be linear: what the mean of payloads "
                        "stands for must be the mean of what each stands for. Gather them "
                        "otherwise.",
                    )


@law
def travels_as_claimed(trial: Trial) -> None:
    """Where `claims().averages`, no step gathers anything; otherwise some step does."""
    averages = trial.compressor.claims().averages
    if not trial.compressed_shapes():
        return
    workers, gathered = trial.simulate(trial.several), False
    for step in range(1 + max(trial.steps - 1, *trial.first_steps())):
        scene = workers.scene
        trace = workers.step(trial.gradients(trial.several, step, kinds=["gaussian"]))
        gathers = [traced for traced in trace if traced.kind in _GATHERS]
        gathered = gathered or bool(gathers)
        if averages and gathers:
            raise Violation(
                f"{scene} gathers {gathers[0].purpose!r} by {gathers[0].kind}, and claims to be "
                f"averaged",
                "Claim averages=False: what a worker receives grows with their number.",
            )
    if not averages and not gathered:
        raise Violation(
            "no step gathers anything, and it claims not to be averaged",
            "Claim averages=True where all that is sent is averaged by all-reduce.",
        )


@law
def draws_as_claimed(trial: Trial) -> None:
    """Where not `claims().is_random`, the number of a step makes no difference within a kind.

    What is sent and what is kept are bitwise the same for the same tensors, from the same state.
    Where it is random, they differ in some of 32 steps, unless all is sent as it is.
    """
    is_random, by_beat = trial.compressor.claims().is_random, defaultdict[Hashable, list[int]](list)
    if not trial.compressed_shapes():
        return
    workers = _started(trial, 1)
    for step in range(HORIZON):
        by_beat[trial.compressor.step_kind(step, dict(workers.group))].append(step)
    all_tried, is_lossy = True, False
    for steps in by_beat.values():
        for buckets in _sections(workers):
            first = None
            for step in steps[: TRIED_AT_RANDOM if is_random else TRIED]:
                (found,) = _exchange(buckets, step, trial.seed, keeps=True)
                first = first or found
                if not all(map(torch.equal, first.bits, found.bits)):
                    if is_random:
                        return
                    raise Violation(
                        f"what is sent or kept for the same tensors is another in step {step} than "
                        f"in step {steps[0]}, and it claims not to be random",
                        "Claim is_random=True where anything is drawn. What else depends on the "
                        "step's number belongs into `step_kind`.",
                    )
                missing = _largest(found.deltas - found.sent)
                is_lossy = is_lossy or missing > ROUNDING * _largest(found.deltas)
            all_tried = all_tried and len(steps) > 1
    if is_random and is_lossy and all_tried:
        raise Violation(
            "what is sent and kept for the same tensors is the same in all steps, and it claims to "
            "be random",
            "Claim is_random=False: what it claims then holds always, not in the mean alone.",
        )


@dataclass(frozen=True)
class _Outcome:
    """What came of an exchange on one worker: flat, matrices alone."""

    deltas: Tensor
    sent: Tensor
    received: Tensor
    kept: Sequence[Tensor]

    @property
    def bits(self) -> list[Tensor]:
        return [self.sent, *self.kept]


def _started(trial: Trial, world_size: int) -> Simulation:
    """Workers after one step, so that their aggregators are there."""
    workers = trial.simulate(world_size)
    workers.step(trial.gradients(world_size, 0, kinds=["gaussian"]))
    return workers


def _sections(workers: Simulation) -> list[tuple[Bucket, ...]]:
    """Those that compress something: of all workers each."""
    own = [optimizer._engine.plan.buckets for optimizer in workers.optimizers]
    return [each for each in zip(*own, strict=True) if each[0].layout.batches]


def _exchange(
    buckets: Sequence[Bucket], step: int, seed: int, *, keeps: bool = False
) -> list[_Outcome]:
    """One exchange of all workers, of tensors that depend on the worker alone.

    Nothing is kept afterwards; with `keeps`, it is looked at what would be.
    """
    for worker, bucket in enumerate(buckets):
        for index, view in bucket.deltas.views.items():
            view.copy_(made_up("scaled", view.shape, worker, seed, 2, index))

    def exchange(bucket: Bucket) -> Exchange[_Outcome]:
        aggregator, deltas = bucket.aggregator, bucket.deltas.flat.clone()
        local = yield from aggregator.compress(bucket.deltas, step)
        left = bucket.deltas.flat.new_zeros(len(deltas))
        local.subtract_from_(_blocks(bucket, left))
        mean = yield from aggregator.aggregate(local)
        received = torch.zeros_like(left)
        mean.decompress_with_(_copy_, _blocks(bucket, received).views)
        return _Outcome(deltas, -left, received, _kept(bucket) if keeps else [])

    return lockstep([exchange(bucket) for bucket in buckets]).results


def _blocks(bucket: Bucket, flat: Tensor) -> Blocks:
    return Blocks(bucket.layout, flat.dtype, flat.device, flat=flat)


def _copy_(values: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for value, target in zip(values, targets, strict=True):
        target.copy_(value)


def _kept(bucket: Bucket) -> list[Tensor]:
    """What the next step would start from; the state is put back."""
    live = [own[name] for own in bucket.aggregator.state().values() for name in sorted(own)]
    before = [tensor.clone() for tensor in live]
    bucket.aggregator.commit_(frozenset())
    kept = [tensor.clone() for tensor in live]
    _copy_(before, live)
    return kept


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
