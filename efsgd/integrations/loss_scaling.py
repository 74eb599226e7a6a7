"""GradScaler decides on each worker by itself; here it is made to decide alike on all of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

# With it, as torch's fused optimizers have it, a scaler calls step() whatever has overflowed.
FLAG = "_step_supports_amp_scaling"


def follow_scaler(
    optimizer: Optimizer, scaler: torch.amp.GradScaler | None, average_: Callable[[], Any]
) -> Callable[[], None]:
    """Has a scaler decide by averaged gradients, the same on every worker.

    Returns:
        A function that ends it.
    """
    if scaler is None:
        if not getattr(optimizer, FLAG, False):
            # A scaler then calls step() on all workers, whichever of them have overflowed.
            setattr(optimizer, FLAG, True)
            return lambda: delattr(optimizer, FLAG)
        return lambda: None
    original, before, is_over = scaler.unscale_, vars(scaler).get("unscale_"), False

    def unscale_(which: Optimizer) -> None:
        if which is optimizer and not is_over and scaler.is_enabled():
            average_()
        original(which)

    def end() -> None:
        nonlocal is_over
        is_over = True
        if vars(scaler).get("unscale_") is unscale_:
            del vars(scaler)["unscale_"]
            vars(scaler).update({} if before is None else {"unscale_": before})

    vars(scaler)["unscale_"] = unscale_
    return end
