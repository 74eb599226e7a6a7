"""All laws, one after the other, for a compressor of whoever wrote it."""

from collections.abc import Sequence

import torch

from efsgd.compressors import Compressor
from efsgd.testing import laws
from efsgd.testing.processes import agrees_in_processes
from efsgd.testing.trial import SHAPES, Law, Trial

#: What `check_compressor` tests, in this order. Each raises a `CompressorLawError` where it does
#: not hold; its docstring says what it asks for.
LAWS: tuple[Law, ...] = (*laws.IN_THIS_THREAD, agrees_in_processes)


def check_compressor(
    compressor: Compressor,
    *,
    world_sizes: Sequence[int] = (1, 2, 3, 4),
    shapes: Sequence[Sequence[int]] = SHAPES,
    steps: int = 4,
    seed: int = 0,
    processes: int = 2,
    error_feedback: bool = True,
) -> None:
    """Tests that a compressor keeps the laws that hold for all of them, and its own claims.

    It is tried inside `ErrorFeedbackSGD`, with many workers in this thread and made-up gradients,
    and at last in worker processes of this machine. Everything comes from seeds: who passes once,
    passes always. For several compressors, pass `processes=0` and call `check_in_processes` once.

    Args:
        compressor: of this package or another; a `TensorCompressor` or any other.
        world_sizes: numbers of workers.
        shapes: of the parameters.
        steps: of most runs. Take as many as it has different kinds of steps (see
            `Compressor.step_kind`), or more.
        seed: of all gradients.
        processes: worker processes to start, over gloo; 0 starts none. The compressor is pickled.
            A script that is run as a whole calls this under ``if __name__ == "__main__":``.
        error_feedback: whether what was not sent is kept. False for compressors that are made
            for training without; nothing is then asked of errors.

    Raises:
        CompressorLawError: names the law (one of `LAWS`), what was found, and what must hold.
        ValueError: an argument is out of range.

    Example:
        >>> from efsgd import PowerSGD
        >>> from efsgd.testing import check_compressor
        >>> check_compressor(PowerSGD(rank=2), processes=0)
    """
    trial = Trial(compressor, world_sizes, shapes, steps, seed, processes, error_feedback)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors are small, and threads would only wait for each other
    try:
        for law in LAWS:
            law(trial)
    finally:
        torch.set_num_threads(threads)
