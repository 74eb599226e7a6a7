"""torch.distributed.algorithms.Join for workers whose batches run out at different times."""

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.optim import Optimizer

from efsgd.errors import WorkerMismatchError

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.algorithms.join import Join, _JoinConfig
    from torch.distributed.algorithms.join import JoinHook as JoinHook

    DISABLED = _JoinConfig.construct_disabled_join_config()
else:
    DISABLED, JoinHook = None, object


def give_notice(optimizer: Any) -> None:
    """Tells workers that have joined that another step is coming."""
    work = Join.notify_join_context(optimizer)
    if work is not None:
        work.wait()


class StepsWithoutGradients(JoinHook):
    """Steps of a worker that has joined: it takes part in the others' without gradients."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer: Any = optimizer

    def main_hook(self) -> None:
        """One step of the others."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            self._optimizer._run_exchange()
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient

    def post_hook(self, is_last_joiner: bool) -> None:
        """All have joined: whoever has changed a setting on the way, did the others as well?"""
        self._optimizer._join_config = DISABLED
        try:
            self._optimizer.compare_workers()
        except WorkerMismatchError as error:
            raise WorkerMismatchError(
                f"{error} This was found as the last worker had joined. A worker that has joined "
                f"takes steps, but runs nothing else of the loop: what changes settings, such as a "
                f"learning rate scheduler, must do so outside of Join."
            ) from None
