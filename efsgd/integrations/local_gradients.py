"""Gradients that a plain model leaves on each worker, and when they are averaged: once."""

from collections.abc import Callable
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from efsgd.errors import warn_user
from efsgd.optimizers.averager import GradientAverager


class LocalGradients:
    """Averages before a step, or earlier where it is asked to.

    Args:
        optimizer: steps with the gradients.
        averager: of the same parameters.
        scaler: of the loss, if it is known.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        averager: GradientAverager,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.averager = averager
        self._optimizer, self._scaler = optimizer, scaler
        # What averaging came to, and the gradients that it left; None: it is yet to be done.
        self._result: bool | None = None
        self._averaged: list[tuple[Tensor, ReferenceType[Tensor] | None]] = []
        self._knew_scale = False
        # Whether a backward pass came after that, and how often gradients had been written then.
        self._has_backward = False
        self._versions: dict[Tensor, int] = {}
        self._has_warned = False
        self._hooks: dict[Tensor, Any] = {}
        self.follow()

    def standing_for(self, parameter: Tensor) -> Tensor:
        """What the averager has in place of a parameter."""
        return parameter

    def follow(self) -> None:
        """The optimizer may have other parameters now."""
        for parameter in parameters_of(self._optimizer):
            if parameter.requires_grad and parameter not in self._hooks:
                hook = parameter.register_post_accumulate_grad_hook(_noting(ref(self)))
                self._hooks[parameter] = hook

    def average_(self) -> bool:
        """Averages what has not been averaged; returns whether that was possible."""
        if not self._is_averaged:
            self._look_for_changes()
            self.forget()
            self._result = self._average()
            gradients = [(p, p.grad) for p in parameters_of(self._optimizer)]
            self._averaged = [(p, None if g is None else ref(g)) for p, g in gradients]
        return bool(self._result)

    def prepare(self) -> bool:
        """`average_`, where a step comes next."""
        is_left = any(g is not None and p.grad is g() for p, g in self._averaged)
        if self._result and self._has_backward and is_left:
            raise RuntimeError(
                "A backward pass has added local gradients to averaged ones: call "
                "attached.average_() after the last backward pass of a step, and "
                "optimizer.zero_grad(), which sets gradients to None, before the first."
            )
        if self._is_averaged and not self._knew_scale and hasattr(self._optimizer, "found_inf"):
            raise RuntimeError(
                "Scaled gradients were averaged as they are, and their errors kept in units of a "
                "scale that changes. Tell of the scaler: efsgd.attach(..., scaler=scaler)."
            )
        return self.average_()

    def forget(self) -> None:
        """What comes next are new gradients."""
        self._result, self._averaged, self._knew_scale = None, [], False
        self._has_backward = False
        self._versions.clear()

    def detach(self) -> None:
        """Leaves parameters as they were."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self.forget()

    @property
    def _is_averaged(self) -> bool:
        """Whether the gradients of now are what averaging has left."""
        is_known = self._result is not None and not self._has_backward
        return is_known and all(p.grad is (g and g()) for p, g in self._averaged)

    def _average(self) -> bool:
        found_inf = getattr(self._optimizer, "found_inf", None)
        if found_inf is None:
            self._knew_scale = self._scaler is not None and self._scaler.is_enabled()
            return self.averager.average_(self._scaler)
        # A scaler is stepping the optimizer, and tells of overflows and scale as it would tell an
        # optimizer that unscales by itself. It is the averager that does.
        optimizer: Any = self._optimizer
        averager: Any = self.averager
        averager.found_inf, averager.grad_scale = found_inf, optimizer.grad_scale
        self._knew_scale = True
        try:
            result: bool = averager.average_()
        finally:
            del averager.found_inf, averager.grad_scale
        optimizer.grad_scale = optimizer.found_inf = None  # unscaled, and finite
        return result

    def _note_backward(self, parameter: Tensor) -> None:
        self._has_backward = True
        if parameter.grad is not None:
            self._versions[parameter] = parameter.grad._version

    def _look_for_changes(self) -> None:
        """Warns where local gradients were changed, as by clipping them."""
        if self._has_warned or self.averager.transport.world_size == 1:
            return
        known = [(p.grad, version) for p, version in self._versions.items()]
        if any(g is not None and g._version != version for g, version in known):
            self._has_warned = True
            warn_user(
                "This worker's own gradients were changed between the backward pass and their "
                "averaging, as by clip_grad_norm_ or scaler.unscale_. To clip the mean, the same "
                "on every worker, call attached.average_() before that, or pass max_grad_norm to "
                "efsgd.attach; with a GradScaler pass scaler=scaler, and clip after "
                "scaler.unscale_(optimizer)."
            )


def _noting(gradients: "ReferenceType[LocalGradients]") -> Callable[[Tensor], None]:
    """A hook that does not keep alive what it tells: Python's collector does not see torch's."""

    def note(parameter: Tensor) -> None:
        told = gradients()
        if told is not None:
            told._note_backward(parameter)

    return note


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
