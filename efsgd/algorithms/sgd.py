"""torch.optim.SGD's update rule, on averaged updates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd_

from efsgd.algorithms.error_feedback import add_multiple_, regularize_

# Elements of a tensor for which starting an operation takes longer than what it does.
SMALL = 2**14


def sgd_(
    updates: Sequence[Tensor],
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor] | None = None,
    *,
    is_first: bool,
    lr: float | Tensor,
    momentum: float | Tensor,
    dampening: float | Tensor,
    nesterov: bool,
    weight_decay: float | Tensor | None = None,
    maximize: bool = False,
    together: bool | None = False,
    foreach: bool | None = None,
    fused: bool | None = None,
    clip: float | Tensor | None = None,
) -> None:
    """torch.optim.SGD's rule, to the bit except for float16 parameters.

    Those are updated from float32: a sum of gradients and errors may exceed what float16 holds.
    Updates, which `clip` multiplies first, parameters and momenta are modified in place. In the
    first step momenta are not begun yet. With `together` torch's own function does it, with its
    kernels for many tensors, `foreach` or `fused`; None: where tensors are small.
    """
    if clip is not None:
        updates = [update.mul_(clip) for update in updates]
    pairs = list(zip(parameters, updates, strict=True))
    given = [u if x.dtype == torch.float16 else u.to(x.dtype) for x, u in pairs]
    # torch's fused kernel for CPUs leaves parts of bfloat16 parameters as they were (torch 2.13).
    is_safe = not fused or all(x.dtype.itemsize >= 4 or not x.is_cpu for x in parameters)
    is_uniform = all(x.dtype == u.dtype for x, u in zip(parameters, given, strict=True))
    # Of fewer digits torch's loop, which it takes by itself, has other bits than its kernels.
    if together is None and is_uniform and all(x.dtype.itemsize >= 4 for x in parameters):
        together = foreach = sum(x.numel() for x in parameters) < SMALL * len(parameters)
    if together and is_safe and is_uniform:
        kernels = {"foreach": foreach, "fused": fused}
        numbers = {"lr": lr, "momentum": momentum, "dampening": dampening}
        flags = {"nesterov": nesterov, "weight_decay": weight_decay or 0, "maximize": maximize}
        own = None if is_first else momenta
        _by_torch_(given, list(parameters), own, momenta, **numbers, **flags, **kernels)
        return
    for position, (x, update) in enumerate(zip(parameters, given, strict=True)):
        regularize_(update, x, weight_decay=weight_decay, maximize=maximize)
        step = update
        if momenta is not None:
            step = m = momenta[position]
            if is_first:
                m.copy_(update)
            else:
                add_multiple_(m.mul_(momentum), 1 - dampening, update)
            if nesterov:
                add_multiple_(update, momentum, m)
                step = update
        add_multiple_(x, -lr, step)


def _by_torch_(
    updates: list[Tensor],
    parameters: list[Tensor],
    begun: Sequence[Tensor] | None,
    momenta: Sequence[Tensor] | None,
    **options: Any,
) -> None:
    if options["fused"]:  # takes no other strides than the parameter's
        pairs = zip(updates, parameters, strict=True)
        updates = [
            u if u.stride() == x.stride() else torch.empty_like(x).copy_(u) for u, x in pairs
        ]
    buffers: list[Tensor | None] = [None] * len(updates) if begun is None else list(begun)
    torch_sgd_(parameters, updates, buffers, **options)
    if begun is None and momenta is not None:  # torch makes a first momentum anew
        for momentum_buffer, made in zip(momenta, buffers, strict=True):
            assert made is not None
            momentum_buffer.copy_(made)
