"""What `efsgd.attach` attaches to an optimizer: when gradients are averaged, and what is saved."""

from collections.abc import Mapping, Sequence
from typing import Any, Never
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from efsgd.checkpoint import average_errors_
from efsgd.engine.parameters import device_of
from efsgd.errors import warn_user
from efsgd.integrations.loss_scaling import follow_scaler
from efsgd.optimizers.averager import GradientAverager

#: Where a state_dict of the optimizer keeps that of the averager.
KEY = "efsgd"

#: Optimizers that have something attached.
ATTACHED: WeakSet[Optimizer] = WeakSet()


class Attached:
    """What `efsgd.attach` has attached to an optimizer.

    Like all hooks it is neither copied nor pickled with the optimizer: attach to the copy anew, and
    load a state_dict.

    Attributes:
        averager: the exchange behind it. Its state is in the optimizer's `state_dict()`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        averager: GradientAverager,
        scaler: torch.amp.GradScaler | None,
        names: Mapping[Tensor, str],
    ) -> None:
        self.averager = averager
        self._optimizer, self._scaler, self._names = optimizer, scaler, names
        # What averaging came to, and the gradients that it left; None: it is yet to be done.
        self._result: bool | None = None
        self._averaged: list[tuple[Tensor, ReferenceType[Tensor] | None]] = []
        self._knew_scale = False
        # Whether a backward pass came after that, and how often gradients had been written then.
        self._has_backward = False
        self._versions: dict[Tensor, int] = {}
        self._has_warned = False
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self._gradient_hooks: dict[Tensor, Any] = {}
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]
        self._end_scaling = follow_scaler(optimizer, scaler, self.average_)
        self._follow_groups()
        ATTACHED.add(optimizer)

    def average_(self) -> bool:
        """Averages now, before something looks at gradients; the next step then does not.

        Every worker must call it, after the last backward pass of a step. For `clip_grad_norm_`,
        and for whatever else is to see Δ', the same on every worker.

        Returns:
            Whether gradients were averaged; see `nonfinite` and `scaler`.

        Raises:
            NonFiniteGradientError: some worker's gradient is NaN or infinite; nothing has changed.
            WorkerMismatchError: the workers do not train the same thing; nothing has changed.
            CollectiveError: a collective failed; nothing has changed on this worker.
        """
        if not self._is_averaged:
            self._follow_groups()
            self._look_for_changes()
            self._forget()
            self._result = self._average()
            gradients = [(p, p.grad) for p in parameters_of(self._optimizer)]
            self._averaged = [(p, None if g is None else ref(g)) for p, g in gradients]
        return bool(self._result)

    def consolidate(self) -> None:
        """Gives every worker the mean of all errors, so that any one worker can save.

        Every worker must call it, before one of them saves `optimizer.state_dict()`; what that one
        saves is then complete, for any number of workers. Training goes on as it would have, but
        for rounding. See `efsgd.checkpoint.average_errors_`.

        Raises:
            CollectiveError: a collective failed; nothing has changed on this worker.
        """
        self._follow_groups()
        average_errors_(self.averager)

    def communication_stats(self) -> dict[str, Any]:
        """What was sent: see `GradientAverager.communication_stats`."""
        return self.averager.communication_stats()

    def metrics(self, *, by_layer: bool = False) -> dict[str, float]:
        """What loggers take: see `GradientAverager.metrics`."""
        return self.averager.metrics(by_layer=by_layer)

    def detach(self) -> None:
        """Leaves the optimizer as it was: it steps with this worker's own gradients again."""
        for hook in (*self._hooks, *self._gradient_hooks.values()):
            hook.remove()
        self._gradient_hooks.clear()
        self._end_scaling()
        self._give_back()
        self._forget()
        ATTACHED.discard(self._optimizer)

    def __reduce__(self) -> Never:
        raise TypeError(
            "What is attached to an optimizer is neither copied nor pickled. Save "
            "optimizer.state_dict(), which has its memory; attach to the other optimizer, and load."
        )

    # ---- averaging ------------------------------------------------------------------------------

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
        optimizer.grad_scale = None
        optimizer.found_inf = torch.zeros((), device=device_of(optimizer.param_groups))
        return result

    def _forget(self) -> None:
        """What comes next are new gradients."""
        self._result, self._averaged, self._knew_scale = None, [], False
        self._has_backward = False
        self._versions.clear()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Averages; where a closure makes the gradients, after it."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._prepare_step()
            return None

        def evaluate() -> Any:
            self._give_back()
            self._forget()
            loss = closure()
            self._prepare_step()
            return loss

        if len(args) > 1:
            return (args[0], evaluate, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluate}

    def _prepare_step(self) -> None:
        is_left = any(g is not None and p.grad is g() for p, g in self._averaged)
        if self._result and self._has_backward and is_left:
            raise RuntimeError(
                "A backward pass has added local gradients to averaged ones: call "
                "attached.average_() after the last backward pass of a step, and "
                "optimizer.zero_grad() before the first."
            )
        if self._is_averaged and not self._knew_scale and hasattr(self._optimizer, "found_inf"):
            raise RuntimeError(
                "Scaled gradients were averaged as they are, and their errors kept in units of a "
                "scale that changes. Tell of the scaler: efsgd.attach(..., scaler=scaler)."
            )
        if not self.average_():
            for parameter in parameters_of(self._optimizer):
                if parameter.grad is not None:  # a step leaves alone what has none
                    self._withheld.append((parameter, parameter.grad))
                    parameter.grad = None

    def _after_step(self, *_: Any) -> None:
        self._give_back()
        self._forget()

    def _give_back(self) -> None:
        """Gives parameters the gradients that a step without effect was not to see."""
        for parameter, gradient in self._withheld:
            parameter.grad = gradient
        self._withheld.clear()

    # ---- what programs do in between ------------------------------------------------------------

    def _follow_groups(self) -> None:
        """Brings the averager's groups up to date with the optimizer's."""
        groups, own = self._optimizer.param_groups, self.averager.param_groups
        for group, twin in zip(groups, own, strict=False):
            if len(group["params"]) != len(twin["params"]) or any(
                p is not q for p, q in zip(group["params"], twin["params"], strict=True)
            ):
                twin |= {k: named(group, self._names)[k] for k in ("params", "param_names")}
        del own[len(groups) :]
        for group in groups[len(own) :]:
            self.averager.add_param_group(named(group, self._names))
        for parameter in parameters_of(self._optimizer):
            if parameter.requires_grad and parameter not in self._gradient_hooks:
                hook = parameter.register_post_accumulate_grad_hook(self._note_backward)
                self._gradient_hooks[parameter] = hook

    def _note_backward(self, parameter: Tensor) -> None:
        self._has_backward = True
        if parameter.grad is not None:
            self._versions[parameter] = parameter.grad._version

    def _look_for_changes(self) -> None:
        """Warns where local gradients were changed, as by clipping them."""
        known = self._versions.items()
        if self._has_warned or self.averager.transport.world_size == 1:
            return
        if any(p.grad is not None and p.grad._version != version for p, version in known):
            self._has_warned = True
            warn_user(
                "This worker's own gradients were changed between the backward pass and their "
                "averaging, as by clip_grad_norm_ or scaler.unscale_. To clip the mean, the same "
                "on every worker, call attached.average_() before that, or pass max_grad_norm to "
                "efsgd.attach; with a GradScaler pass scaler=scaler, and clip after "
                "scaler.unscale_(optimizer)."
            )

    # ---- checkpoints ----------------------------------------------------------------------------

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._follow_groups()
        state_dict[KEY] = self.averager.state_dict()

    def _load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._follow_groups()
        saved = state_dict.get(KEY)
        if saved is None:
            groups = self.averager.state_dict()["param_groups"]
            new = {"step": 0, "worker": 0, "world_size": 0}
            saved = {"state": {}, "param_groups": [{**group, **new} for group in groups]}
            warn_user(
                f"The state_dict that is loaded has no {KEY!r}: it was saved without efsgd.attach. "
                f"Compression begins anew, without errors."
            )
        self.averager.load_state_dict(saved)
        self._forget()


def named(group: Mapping[str, Any], names: Mapping[Tensor, str]) -> dict[str, Any]:
    """A copy of a group in which all parameters have names."""
    parameters: Sequence[Tensor] = group["params"]
    given = group.get("param_names") or [names.get(p, "not in the model") for p in parameters]
    return {**group, "params": list(parameters), "param_names": list(given)}


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
