"""Gradients that DistributedDataParallel has averaged, compressed, during the backward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from efsgd.algorithms.interfaces import Compressor
from efsgd.ddp import CompressionState, compress
from efsgd.integrations.local_gradients import parameters_of


class HookedGradients:
    """Registers the hook, and says what the last backward pass came to.

    Args:
        model: has no hook yet.
        optimizer: steps with the gradients.
        groups: those of the optimizer, with names.
        compressor: what is sent.
        scaler: of the loss.
        options: of `CompressionState`.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        optimizer: Optimizer,
        groups: Sequence[dict[str, Any]],
        compressor: Compressor | None,
        scaler: torch.amp.GradScaler | None,
        options: dict[str, Any],
    ) -> None:
        _require_same(model, optimizer)
        self._optimizer, self._scaler = optimizer, scaler
        self._state = CompressionState(
            list(groups),
            compressor,
            scaler=scaler,
            process_group=model.process_group,
            model=model.module,
            **options,
        )
        self.averager = self._state.averager
        self._passes = 0  # those before the last step
        try:
            model.register_comm_hook(self._state, compress)
        except RuntimeError as error:
            raise ValueError(
                "The DistributedDataParallel has a communication hook already, and takes one in "
                "its life. Register no other, and to attach again wrap the model anew. If that "
                "hook leaves gradients alone (noop_hook), pass attach the model within: ddp.module."
            ) from error

    def standing_for(self, parameter: Tensor) -> Tensor:
        """What the averager has in place of a parameter."""
        stand_in = self._state.stand_in_of(parameter)
        if stand_in is None:
            raise ValueError(
                f"The optimizer has a parameter of shape {list(parameter.shape)} that "
                f"DistributedDataParallel does not average. Make the model complete, wrap it, and "
                f"give all that it trains to the optimizer before efsgd.attach."
            )
        return stand_in

    def follow(self) -> None:
        """The optimizer may have other parameters now: DDP has not."""

    def average_(self) -> bool:
        """Whether the gradients of the last backward pass were averaged."""
        is_told = self._state.passes != self._passes
        if not is_told and any(p.grad is not None for p in parameters_of(self._optimizer)):
            raise RuntimeError(
                "There are gradients that no worker has been sent: since the last step every "
                "backward pass was within no_sync(), or has raised. Leave no_sync() out for the "
                "last backward pass before a step, and zero_grad() after one that has raised."
            )
        return self._state.check()

    def prepare(self) -> bool:
        """`average_`, where a step comes next."""
        is_known = self._scaler is not None and self._scaler.is_enabled()
        if hasattr(self._optimizer, "found_inf") and not is_known:
            raise RuntimeError(
                "A GradScaler scales the loss, and efsgd.attach was not told: scaled gradients "
                "were averaged as they are, and their errors kept in units of a scale that "
                "changes. Tell of the scaler: efsgd.attach(..., scaler=scaler)."
            )
        return self.average_()

    def forget(self) -> None:
        """What comes next are new gradients."""
        self._passes = self._state.passes

    def detach(self) -> None:
        """From now on DDP averages gradients at full size."""
        self._state.detach()


def _require_same(model: DistributedDataParallel, optimizer: Optimizer) -> None:
    """Raises ValueError unless the optimizer trains what DDP averages."""
    ignored = model.parameters_to_ignore
    named = model.module.named_parameters()
    averaged = {p: name for name, p in named if p.requires_grad and name not in ignored}
    trained = parameters_of(optimizer)
    if missing := [name for parameter, name in averaged.items() if parameter not in {*trained}]:
        raise ValueError(
            f"DistributedDataParallel averages {missing[0]} (one of {len(missing)}), which the "
            f"optimizer does not have. Freeze what is not trained, requires_grad_(False), before "
            f"wrapping the model. For several optimizers take the model without "
            f"DistributedDataParallel, and attach to each."
        )
    if any(p.requires_grad and p not in averaged for p in trained):
        raise ValueError(
            "The optimizer has parameters that DistributedDataParallel does not average: each "
            "worker would train its own. Wrap a module that contains all of them."
        )
