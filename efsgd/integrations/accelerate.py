"""Accelerate: a `prepare` that compresses, saves and resumes; "pip install efsgd[frameworks]"."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from efsgd.algorithms.interfaces import Compressor
from efsgd.integrations.attach import attach

try:
    from accelerate.optimizer import AcceleratedOptimizer
except ImportError as error:
    raise ImportError(
        "efsgd.integrations.accelerate prepares for Accelerate, which is not installed. "
        "Install it with: pip install accelerate"
    ) from error

__all__ = ["prepare"]

# Workers that hold whole parameters and gradients of their own.
_PARALLEL = "NO", "MULTI_"


def prepare(
    accelerator: Any, *objects: Any, compressor: Compressor | None = None, **options: Any
) -> tuple[Any, ...]:
    """Compresses gradients as well: `accelerator.prepare`, and `efsgd.attach` after it.

    Gradients are averaged during the backward pass, as without compression, so that
    `accelerator.clip_grad_norm_` clips averaged ones. `accelerator.save_state` writes what
    compression remembers, the mean over all workers, and `accelerator.load_state` reads it, on any
    number of them.

    Args:
        accelerator: an `accelerate.Accelerator`.
        objects: what `accelerator.prepare` is given, in any order: one model, one optimizer, and
            whatever else there is.
        compressor: what is sent; None is `PowerSGD(rank=4)`.
        options: those of `efsgd.attach`, but for the scaler, which is the accelerator's.

    Returns:
        The prepared objects in the order given, and last what `efsgd.attach` returns, with
        `metrics()` for `accelerator.log`.

    Raises:
        ValueError: there is not one model and one optimizer, or an option is out of range.
        TypeError: the optimizer exchanges gradients by itself, or is none of torch's.
        NotImplementedError: the accelerator shards models or optimizers.

    Example:
        >>> import torch
        >>> from accelerate import Accelerator
        >>> from efsgd import PowerSGD
        >>> from efsgd.integrations.accelerate import prepare
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> accelerator = Accelerator(cpu=True)
        >>> model, optimizer, compression = prepare(
        ...     accelerator, model, optimizer, compressor=PowerSGD(rank=2)
        ... )
        >>> accelerator.backward(model(torch.ones(8, 64)).square().mean())
        >>> optimizer.step()
        >>> compression.communication_stats()["steps"]
        1
    """
    kinds = nn.Module, Optimizer
    models, optimizers = ([o for o in objects if isinstance(o, kind)] for kind in kinds)
    if len(models) != 1 or len(optimizers) != 1:
        raise ValueError(
            f"Invalid objects: {len(models)} models and {len(optimizers)} optimizers. Must be one "
            f"of each, and whatever else is to be prepared. Prepare several with "
            f"accelerator.prepare, and call efsgd.attach for each pair."
        )
    if not accelerator.distributed_type.value.startswith(_PARALLEL):
        raise NotImplementedError(
            f"Accelerate is set up for {accelerator.distributed_type.value}. Compression is for "
            f"workers that hold whole models: use its data-parallel training (MULTI_GPU, ...)."
        )
    prepared = accelerator.prepare(*objects)
    at = {id(given): own for given, own in zip(objects, prepared, strict=True)}
    model, optimizer = at[id(models[0])], at[id(optimizers[0])]
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    attached = attach(model, optimizer, compressor, scaler=accelerator.scaler, **options)
    # All workers call save_state, and worker 0 writes the optimizer.
    accelerator.register_save_state_pre_hook(lambda *_: attached.consolidate())
    return *prepared, attached
