"""What `efsgd.attach` attaches to an optimizer: when gradients are averaged, and what is saved."""

from collections.abc import Mapping, Sequence
from operator import is_not
from typing import TYPE_CHECKING, Any, Never
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from efsgd.checkpoint import average_errors_
from efsgd.errors import warn_user
from efsgd.integrations.local_gradients import LocalGradients, parameters_of
from efsgd.integrations.loss_scaling import follow_scaler

if TYPE_CHECKING:  # torch may have been built without distributed
    from efsgd.integrations.hooked_gradients import HookedGradients

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
        gradients: "LocalGradients | HookedGradients",
        scaler: torch.amp.GradScaler | None,
        names: Mapping[Tensor, str],
    ) -> None:
        self.averager = gradients.averager
        self._optimizer, self._gradients, self._names = optimizer, gradients, names
        self._withheld: list[tuple[Tensor, Tensor]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._load),
        ]
        self._end_scaling = follow_scaler(optimizer, scaler, self.average_)
        ATTACHED.add(optimizer)

    def average_(self) -> bool:
        """Averages now, before something looks at gradients; the next step then does not.

        Every worker must call it, after the last backward pass of a step. For `clip_grad_norm_`,
        and for whatever else is to see Δ', the same on every worker. Under
        `DistributedDataParallel` the backward pass has averaged, and this says whether it could.

        Returns:
            Whether gradients were averaged; see `nonfinite` and `scaler`.

        Raises:
            NonFiniteGradientError: some worker's gradient is NaN or infinite; nothing has changed.
            WorkerMismatchError: the workers do not train the same thing; nothing has changed.
            CollectiveError: a collective failed; nothing has changed on this worker.
        """
        self._follow_groups()
        return self._gradients.average_()

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
        """Leaves the optimizer as it was.

        A plain model's gradients are this worker's own again; `DistributedDataParallel` averages
        them at full size. Every worker must call it.
        """
        for hook in self._hooks:
            hook.remove()
        self._end_scaling()
        self._give_back()
        self._gradients.detach()
        ATTACHED.discard(self._optimizer)

    def __reduce__(self) -> Never:
        raise TypeError(
            "What is attached to an optimizer is neither copied nor pickled. Save "
            "optimizer.state_dict(), which has its memory; attach to the other optimizer, and load."
        )

    # ---- steps ----------------------------------------------------------------------------------

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
            self._gradients.forget()
            loss = closure()
            self._prepare_step()
            return loss

        if len(args) > 1:
            return (args[0], evaluate, *args[2:]), kwargs
        return args, {**kwargs, "closure": evaluate}

    def _prepare_step(self) -> None:
        self._withheld.clear()  # of a step that has raised
        self._follow_groups()
        if not self._gradients.prepare():
            for parameter in parameters_of(self._optimizer):
                if parameter.grad is not None:  # a step leaves alone what has none
                    self._withheld.append((parameter, parameter.grad))
                    parameter.grad = None

    def _after_step(self, *_: Any) -> None:
        self._give_back()
        self._gradients.forget()

    def _give_back(self) -> None:
        """Gives parameters the gradients that a step without effect was not to see."""
        for parameter, gradient in self._withheld:
            parameter.grad = gradient
        self._withheld.clear()

    def _follow_groups(self) -> None:
        """Brings the averager's groups up to date with the optimizer's."""
        groups, own = self._optimizer.param_groups, self.averager.param_groups
        for group, twin in zip(groups, own, strict=False):
            found = [self._gradients.standing_for(p) for p in group["params"]]
            if len(found) != len(twin["params"]) or any(map(is_not, found, twin["params"])):
                twin["params"] = found
                twin["param_names"] = named(group, self._names)["param_names"]
        del own[len(groups) :]
        for group in groups[len(own) :]:
            found = [self._gradients.standing_for(p) for p in group["params"]]
            self.averager.add_param_group({**named(group, self._names), "params": found})
        self._gradients.follow()

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
        self._gradients.forget()


def named(group: Mapping[str, Any], names: Mapping[Tensor, str]) -> dict[str, Any]:
    """A copy of a group in which all parameters have names."""
    parameters: Sequence[Tensor] = group["params"]
    given = group.get("param_names") or [names.get(p, "not in the model") for p in parameters]
    return {**group, "params": list(parameters), "param_names": list(given)}
