"""Laws of compressing and decompressing, looked at without workers."""

from collections.abc import Iterator

import torch
from torch import Tensor

from efsgd.algorithms.operators import Payload
from efsgd.compressors import TensorCompressor
from efsgd.randomness import Draws
from efsgd.testing.gradients import gaussian
from efsgd.testing.trial import Trial, law
from efsgd.testing.violations import Violation
from efsgd.wire.collectives import run
from efsgd.wire.transports import Alone


def _payloads(
    trial: Trial, compressor: TensorCompressor, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Payload, Draws]]:
    """Tensors, what is sent for them, and what is drawn from when decompressing it."""
    shapes = trial.compressed_shapes()
    if compressor.takes_all_at_once:
        shapes = [torch.Size([shape.numel()]) for shape in shapes]
    for index, shape in enumerate(shapes):
        delta = gaussian(shape, trial.seed, index).to(dtype)
        where = compressor.seed_of_draws, index, trial.seed
        payload = compressor.compress(delta, Draws(*where, 0))
        yield delta, payload, Draws(*where, None)


@law
def decompresses_alike(trial: Trial) -> None:
    """What a payload stands for depends on payload, shape and shared numbers alone.

    For compressors of one tensor at a time: `decompress` gives the tensor's shape, and the same
    whenever it is called; `add_decompressed_` adds the same, times alpha; neither changes the
    payload; and a payload of zeros stands for zeros.
    """
    compressor = trial.compressor
    if not isinstance(compressor, TensorCompressor):
        return
    for delta, payload, draws in _payloads(trial, compressor, torch.float64):
        what = f"for shape {list(delta.shape)}"
        sent = [field.clone() for field in payload]
        once = compressor.decompress(payload, delta.shape, draws)
        if once.shape != delta.shape:
            raise Violation(
                f"{what} decompress returns shape {list(once.shape)}",
                "decompress must return the shape that it is given.",
            )
        if not torch.equal(once, compressor.decompress(payload, delta.shape, draws)):
            raise Violation(
                f"{what} decompress returns something else when it is called again",
                "All workers must get the same from a payload: draw from draws.shared() alone.",
            )
        out = torch.ones_like(delta)
        compressor.add_decompressed_(out, payload, draws, -0.5)
        # Two numerics of float64, relative to the largest summand.
        if (out - (1 - 0.5 * once)).abs().max() > 1e-14 * max(1.0, float(once.abs().max())):
            raise Violation(
                f"{what} add_decompressed_ adds something else than alpha times what decompress "
                f"returns",
                "Let both say the same, or leave add_decompressed_ away.",
            )
        if not all(map(torch.equal, sent, payload)):
            raise Violation(f"{what} decompressing modifies the payload", "It must not.")
        zeros = [torch.zeros_like(field) for field in payload]
        if compressor.decompress(zeros, delta.shape, draws).any():
            raise Violation(
                f"{what} a payload of zeros stands for something else than zeros",
                "Workers that cannot take part in a step send zeros. Shift codes, or send a scale.",
            )


@law
def leaves_deltas_alone(trial: Trial) -> None:
    """Compressing does not modify what is compressed, and no payload is a view of it.

    What was compressed becomes the new error once what was sent is subtracted, in place.
    """
    compressor = trial.compressor
    remedy = "Copy what is to be changed or sent, for example by delta.clone()."
    if isinstance(compressor, TensorCompressor):
        for delta, payload, _ in _payloads(trial, compressor, torch.float64):
            own = delta.untyped_storage().data_ptr()
            if any(field.untyped_storage().data_ptr() == own for field in payload):
                raise Violation(
                    f"for shape {list(delta.shape)} compress returns a view of delta", remedy
                )
    for dtype in (torch.float32, torch.float64):
        workers = trial.simulate(1, dtype)
        workers.step(trial.gradients(1, 0, kinds=["gaussian"]))
        for bucket in workers.optimizers[0]._engine.plan.buckets:
            deltas = bucket.deltas
            for index, view in deltas.views.items():
                view.copy_(gaussian(view.shape, trial.seed, 1, index))
            kept = {index: view.clone() for index, view in deltas.views.items()}
            run(bucket.aggregator.compress(deltas, 1), Alone())
            for entry in (entry for batch in bucket.layout.batches for entry in batch.entries):
                if not torch.equal(deltas.views[entry.index], kept[entry.index]):
                    raise Violation(
                        f"compress modifies a tensor of shape {list(entry.shape)} in {dtype}",
                        remedy,
                    )
