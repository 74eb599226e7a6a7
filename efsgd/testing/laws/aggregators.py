"""Laws of compressing and aggregating, looked at from inside."""

from collections.abc import Iterator

import torch
from torch import Tensor

from efsgd.algorithms.operators import Payload
from efsgd.compressors import TensorCompressor
from efsgd.randomness import Draws, RowDraws
from efsgd.testing.gradients import gaussian
from efsgd.testing.senders import exchange, senders
from efsgd.testing.simulation import largest
from efsgd.testing.trial import Trial, law
from efsgd.testing.violations import Violation
from efsgd.wire.collectives import run
from efsgd.wire.transports import Alone

# What is lost to rounding in float64: 2e-16 for each of some dozen sums.
TOLERANCE = 1e-10

# What may be missing of a tensor that is sent as it is: payloads may have numbers in float32.
ROUNDING = 1e-6

# Steps among which others of the same kind are looked for, and how many of them are tried.
HORIZON, TRIED, TRIED_AT_RANDOM = 256, 6, 32


@law(
    "It must give the same on all workers (draw from draws.shared() alone), in the shape that was "
    "asked for, without modifying the payload; and payloads of zeros, which workers send that "
    "cannot take part in a step, must decompress to zeros: shift codes, or send a scale."
)
def decompresses_alike(trial: Trial) -> None:
    """What a payload decompresses to depends on payload, shape and shared numbers alone.

    For compressors of one tensor at a time: `decompress` gives the tensor's shape, and the same
    whenever it is called; `add_decompressed_` adds the same, times alpha; neither changes the
    payload; and a payload of zeros decompresses to zeros.
    """
    compressor = trial.compressor
    for delta, payload, draws in _payloads(trial):
        assert isinstance(compressor, TensorCompressor)
        what = f"for shape {list(delta.shape)}"
        sent = [field.clone() for field in payload]
        once = compressor.decompress(payload, delta.shape, draws)
        if once.shape != delta.shape:
            raise Violation(f"{what} decompress returns shape {list(once.shape)}")
        if not torch.equal(once, compressor.decompress(payload, delta.shape, draws)):
            raise Violation(f"{what} decompress returns something else when called again")
        out = torch.ones_like(delta)
        compressor.add_decompressed_(out, payload, draws, -0.5)
        # Two roundings of float64, relative to the largest summand.
        if largest(out - (1 - 0.5 * once)) > 1e-14 * max(1.0, largest(once)):
            raise Violation(f"{what} add_decompressed_ does not add alpha times the same")
        if not all(map(torch.equal, sent, payload)):
            raise Violation(f"{what} decompressing modifies the payload")
        zeros = [torch.zeros_like(field) for field in payload]
        if compressor.decompress(zeros, delta.shape, draws).any():
            raise Violation(f"{what} a payload of zeros does not decompress to zeros")


@law(
    "Compute each row by the operations of `compress` and `decompress`, in the same order, with "
    "the random numbers of `draws[row]`; or let `takes_rows` return False."
)
def compresses_rows_alike(trial: Trial) -> None:
    """Tensors that are compressed together become, to the bit, what each becomes by itself.

    For compressors whose `takes_rows` says so: payloads, what they decompress to, and what
    `add_decompressed_rows_` adds. Payloads are not changed.
    """
    compressor = trial.compressor
    if not isinstance(compressor, TensorCompressor) or compressor.takes_all_at_once:
        return
    for shape in filter(compressor.takes_rows, trial.compressed_shapes()):
        what, numbers = f"for shape {list(shape)}", (2, 0, 7)
        deltas = torch.stack([gaussian(shape, trial.seed, number) for number in numbers])
        own, all_ = (
            RowDraws(compressor.seed_of_draws, numbers, trial.seed, worker) for worker in (0, None)
        )
        payload = compressor.compress_rows(deltas, own)
        sent = [field.clone() for field in payload]
        for alpha in (-1.0, 0.3):
            out = deltas.clone()
            compressor.add_decompressed_rows_(out, payload, all_, alpha)
            decoded = compressor.decompress_rows(payload, shape, all_)
            if not all(map(torch.equal, sent, payload)):
                raise Violation(f"{what} decompressing rows modifies the payload")
            for row, delta in enumerate(deltas):
                fields = compressor.compress(delta.clone(), own[row])
                if not all(torch.equal(a, b[row]) for a, b in zip(fields, payload, strict=True)):
                    raise Violation(f"{what} compress_rows differs from compress")
                if not torch.equal(decoded[row], compressor.decompress(fields, shape, all_[row])):
                    raise Violation(f"{what} decompress_rows differs from decompress")
                one = delta.clone()
                compressor.add_decompressed_(one, fields, all_[row], alpha)
                if not torch.equal(one, out[row]):
                    raise Violation(f"{what} add_decompressed_rows_ differs from that of a tensor")


@law("Copy what is to be changed or sent, for example by delta.clone().")
def leaves_deltas_alone(trial: Trial) -> None:
    """Compressing does not modify what is compressed, and no payload is a view of it.

    What was compressed becomes the new error once what was sent is subtracted, in place.
    """
    for delta, payload, _ in _payloads(trial):
        own = delta.untyped_storage().data_ptr()
        if any(field.untyped_storage().data_ptr() == own for field in payload):
            raise Violation(f"for shape {list(delta.shape)} compress returns a view of delta")
    for dtype in (torch.float32, torch.float64):
        [sender] = senders(trial, 1, dtype)
        deltas = sender.fill(sender.made_up("gaussian"))
        kept = {index: view.clone() for index, view in deltas.views.items()}
        run(sender.aggregator.compress(deltas, 1), Alone())
        for batch in deltas.layout.batches:
            for entry in batch.entries:
                if not torch.equal(deltas.views[entry.index], kept[entry.index]):
                    shape = list(entry.shape)
                    raise Violation(f"compress modifies a tensor of shape {shape} in {dtype}")


@law(
    "With `averages`, `decompress` must be linear: what the mean of payloads decompresses to must "
    "be the mean of what each decompresses to. Gather them otherwise."
)
def averages_what_is_sent(trial: Trial) -> None:
    """What all workers get is the mean of what each of them has sent.

    That is, of what each worker itself subtracts for it, where it keeps an error. To 1e-10 in
    float64, in a step of every kind, with error feedback and without.
    """
    for world_size in trial.fewest_and_most:
        workers = senders(trial, world_size)
        for step in trial.first_steps():
            found = exchange(workers, step)
            sent = torch.stack([each.sent for each in found]).mean(0)
            greatest = max(largest(each.sent) for each in found)
            wrong = max(largest(each.received - sent) for each in found)
            if not wrong <= TOLERANCE * greatest:
                raise Violation(
                    f"in step {step} with {world_size} workers, what they get differs by "
                    f"{wrong:.3g} from the mean of what is sent, values up to {greatest:.3g}"
                )


@law(
    "Claim averages=True where all that is sent is averaged by all-reduce, and False otherwise: "
    "what a worker receives then grows with their number."
)
def travels_as_claimed(trial: Trial) -> None:
    """Where `claims().averages`, no step gathers anything; otherwise some step does."""
    averages = trial.compressor.claims().averages
    if not trial.compressed_shapes():
        return
    workers = trial.simulate(trial.several)
    gathered = False
    for step in range(1 + max(trial.steps - 1, *trial.first_steps())):
        scene, _, trace = workers.take(step, kinds=["gaussian"])
        gathering = [t.purpose for t in trace if t.kind in ("AllGather", "AllToAll")]
        gathered = gathered or bool(gathering)
        if averages and gathering:
            raise Violation(f"{scene} gathers {gathering[0]!r}, and it claims to be averaged")
    if not averages and not gathered:
        raise Violation("no step gathers anything, and it claims not to be averaged")


@law(
    "Claim is_random=True where anything is drawn, and False otherwise. What else depends on the "
    "step's number belongs into `step_kind`."
)
def draws_as_claimed(trial: Trial) -> None:
    """Where not `claims().is_random`, the number of a step makes no difference within a kind.

    What is sent and what is kept are bitwise the same for the same tensors, from the same state.
    Where it is random, they differ in some of 32 steps, unless all is sent as it is.
    """
    is_random = trial.compressor.claims().is_random
    if not trial.compressed_shapes():
        return
    workers, kinds = senders(trial, 1), trial.kinds_of_steps(HORIZON).values()
    is_lossy = False
    for steps in kinds:
        first: list[Tensor] = []
        for step in steps[: TRIED_AT_RANDOM if is_random else TRIED]:
            [found] = exchange(workers, step)
            outcome = [found.sent, *found.kept.values()]
            first = first or outcome
            if not all(map(torch.equal, first, outcome)):
                if is_random:
                    return
                raise Violation(
                    f"step {step} sends or keeps something else for the same tensors than step "
                    f"{steps[0]}, and it claims not to be random"
                )
            missing = largest(found.deltas - found.sent)
            is_lossy = is_lossy or missing > ROUNDING * largest(found.deltas)
    if is_random and is_lossy and all(len(steps) > 1 for steps in kinds):
        raise Violation("all steps send and keep the same, and it claims to be random")


def _payloads(trial: Trial) -> Iterator[tuple[Tensor, Payload, Draws]]:
    """Tensors, their payloads, and draws to decompress these; of a `TensorCompressor` alone."""
    compressor, shapes = trial.compressor, trial.compressed_shapes()
    if not isinstance(compressor, TensorCompressor):
        return
    if compressor.takes_all_at_once:
        shapes = [torch.Size([shape.numel()]) for shape in shapes]
    for index, shape in enumerate(shapes):
        delta = gaussian(shape, trial.seed, index)
        where = compressor.seed_of_draws, index, trial.seed
        yield delta, compressor.compress(delta, Draws(*where, 0)), Draws(*where, None)
