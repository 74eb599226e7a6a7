"""Compressed gradients for the optimizer that a program has: one line after its constructor."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from efsgd.algorithms.interfaces import Compressor
from efsgd.errors import warn_user
from efsgd.integrations.attached import ATTACHED, KEY, Attached, named
from efsgd.integrations.equal_starts import broadcast_model, uncompiled
from efsgd.integrations.local_gradients import LocalGradients, parameters_of
from efsgd.optimizers.averager import GradientAverager
from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.wire.transports import Workers

# Optimizers that steps are taken with by hand: see docs/any-optimizer.md.
_UNFIT = {
    "LBFGS": "evaluates its closure several times in a step, and decides by the loss how often: "
    "average the loss as well, and the gradients with GradientAverager.average_(), in the closure",
    "SparseAdam": "takes sparse gradients only, and averaged ones are dense: use a "
    "GradientAverager, and p.grad.to_sparse(1) after its average_()",
}


def attach(
    model: nn.Module,
    optimizer: Optimizer,
    compressor: Compressor | None = None,
    *,
    scaler: torch.amp.GradScaler | None = None,
    error_feedback: bool = True,
    start_compressing_at: int = 0,
    nonfinite: str = "raise",
    max_grad_norm: float | None = None,
    check_every: int = 0,
    bucket_bytes: int | None = None,
    process_group: Workers = None,
) -> Attached:
    """Has an optimizer of torch step with the compressed mean of all workers' gradients.

    From then on `optimizer.step()` finds Δ' in place of each gradient (Algorithm 2 of PowerSGD,
    lines 7 to 11), the same on every worker, and `optimizer.state_dict()` has all that compression
    remembers, under the key "efsgd". Nothing else of a program changes. Every worker must call
    this, at the same place.

    Under `DistributedDataParallel` gradients are exchanged during the backward pass, by its
    communication hook: see `efsgd.ddp`. Without it they are at the beginning of `step()`, and
    worker 0's parameters and buffers are given to all workers here, as that wrapper does.

    Args:
        model: what is trained: a `DistributedDataParallel` or a plain model, compiled or not.
        optimizer: AdamW, or any other that takes its gradients from `p.grad`. Its groups are
            those of the exchange; `rank` and other settings of the compressor may stand in them.
        compressor: what is sent; None is `PowerSGD(rank=4)`.
        scaler: of the loss, in mixed precision. `DistributedDataParallel` needs it, or else steps
            raise. With a plain model it makes `scaler.unscale_(optimizer)` average first, so that
            what clips or looks at gradients after that sees the mean; steps work without.
        error_feedback: see `PowerSGDOptimizer`, as for all that follow.
        start_compressing_at: steps that are sent uncompressed first.
        nonfinite: what all workers do when any of them has a NaN or infinite gradient: "raise"
            a `NonFiniteGradientError`, or "skip": the optimizer's step has no effect then.
        max_grad_norm: clips the norm of Δ', which is that of the mean gradient on every worker.
        check_every: compare the workers every so many steps.
        bucket_bytes: see `PowerSGDOptimizer`; None: under `DistributedDataParallel` as much as a
            bucket of its has, otherwise all together.
        process_group: the workers; None is the default group, or `DistributedDataParallel`'s.

    Returns:
        What is attached: it reports, averages early, saves, and detaches.

    Raises:
        ValueError: an argument is out of range; or the optimizer has something attached already,
            or does not train what belongs to the model.
        TypeError: the optimizer exchanges gradients by itself, or is none of torch's.
        NotImplementedError: LBFGS and SparseAdam, which need more than averaged gradients.
        WorkerMismatchError: the workers' models are not alike.

    Example:
        >>> import efsgd
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> attached = efsgd.attach(model, optimizer, efsgd.PowerSGD(rank=2))
        >>> model(torch.ones(8, 64)).square().mean().backward()
        >>> optimizer.step()
        >>> attached.communication_stats()["steps"]
        1
    """
    _require_fit(model, optimizer)
    wrapper = uncompiled(model)
    inner = wrapper.module if isinstance(wrapper, DistributedDataParallel) else wrapper
    names: dict[Tensor, str] = {p: name for name, p in uncompiled(inner).named_parameters()}
    groups = [named(group, names) for group in optimizer.param_groups]
    options: dict[str, Any] = {
        "error_feedback": error_feedback,
        "start_compressing_at": start_compressing_at,
        "nonfinite": nonfinite,
        "max_grad_norm": max_grad_norm,
        "check_every": check_every,
        **({} if bucket_bytes is None else {"bucket_bytes": bucket_bytes}),
    }
    gradients: Any
    if isinstance(wrapper, DistributedDataParallel):
        # torch may have been built without what is imported there.
        from efsgd.integrations.hooked_gradients import HookedGradients

        if process_group is not None:
            raise ValueError(
                "process_group is that of DistributedDataParallel: pass it there, and not here."
            )
        gradients = HookedGradients(wrapper, optimizer, groups, compressor, scaler, options)
    else:
        if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise ValueError(
                "A part of the model is a DistributedDataParallel, which averages its gradients at "
                "full size. Pass attach that wrapper, around all that is trained, or a model "
                "without any."
            )
        averager = GradientAverager(groups, compressor, process_group=process_group, **options)
        broadcast_model(model, averager)
        gradients = LocalGradients(optimizer, averager, scaler)
    if optimizer.state:
        warn_user(
            f"The optimizer has a state already, and compression begins anew, without errors. If "
            f"it was loaded from a checkpoint of a run with efsgd.attach, load that again now: "
            f"what compression remembers is in it, under {KEY!r}, and was left out."
        )
    return Attached(optimizer, gradients, scaler, names)


def _require_fit(model: object, optimizer: object) -> None:
    """Raises unless the optimizer is one that averaged gradients suffice for."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"Invalid model: {type(model).__name__}. Must be a torch.nn.Module.")
    kind = type(optimizer).__name__
    if isinstance(optimizer, ErrorFeedbackOptimizer) or hasattr(optimizer, "original_optimizer"):
        raise TypeError(
            f"Invalid optimizer: {kind}. It exchanges gradients by itself: leave attach out, which "
            f"is for optimizers of torch, such as AdamW."
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Invalid optimizer: {kind}. Must be a torch.optim.Optimizer.")
    for name, reason in _UNFIT.items():
        if isinstance(optimizer, getattr(torch.optim, name)):
            raise NotImplementedError(
                f"{name} {reason}. docs/any-optimizer.md shows how, without attach."
            )
    if optimizer in ATTACHED:
        raise ValueError(
            "Something is attached to this optimizer already. Call detach() of what attach "
            "returned first, to attach with other settings, and wrap the model in a new "
            "DistributedDataParallel, if it is in one: that takes one hook in its life."
        )
    if {*model.parameters()}.isdisjoint(parameters_of(optimizer)):
        raise ValueError(
            "The optimizer trains none of the model's parameters. Make the optimizer after the "
            "model is complete, and pass both that belong together."
        )
