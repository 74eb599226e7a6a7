"""GradScaler decides on each worker by itself; here it is made to decide alike on all of them."""

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakMethod, ref

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
    averaging = _Averaging(scaler, optimizer, average_)

    def end() -> None:
        averaging.is_over = True
        if vars(scaler).get("unscale_") is averaging:
            del vars(scaler)["unscale_"]
            if averaging.before is not None:
                vars(scaler)["unscale_"] = averaging.before

    vars(scaler)["unscale_"] = averaging
    return end


class _Averaging:
    """`scaler.unscale_`, which has the gradients of one optimizer averaged first.

    A scaler that is pickled leaves that behind. `before` is what else stands in this place.
    """

    def __init__(
        self, scaler: torch.amp.GradScaler, optimizer: Optimizer, average_: Callable[[], Any]
    ) -> None:
        self._scaler, self._optimizer = ref(scaler), ref(optimizer)
        self._average_ = WeakMethod(average_)
        self.before: Callable[[Optimizer], None] | None = vars(scaler).get("unscale_")
        self.is_over = False

    def __call__(self, which: Optimizer) -> None:
        scaler, average_ = self._scaler(), self._average_()
        assert scaler is not None
        is_ours = which is self._optimizer() and not self.is_over
        if is_ours and average_ is not None and scaler.is_enabled():
            average_()
        if self.before is not None:
            self.before(which)
        else:
            type(scaler).unscale_(scaler, which)

    def __reduce__(self) -> tuple[Any, ...]:
        scaler = self._scaler()
        assert scaler is not None
        return functools.partial, (type(scaler).unscale_, scaler)
