"""torch.distributed.algorithms.Join for workers whose batches run out at different times."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from efsgd.errors import WorkerMismatchError

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.algorithms.join import Join, Joinable, JoinHook, _JoinConfig

    DISABLED = _JoinConfig.construct_disabled_join_config()
else:
    DISABLED, JoinHook = None, object


class Joining:
    """Gives an optimizer what `Join` asks of a `Joinable`, and needs no torch.distributed itself.

    A worker that has joined takes part in the steps of the others as one without gradients.
    """

    process_group: dist.ProcessGroup | None
    param_groups: list[dict[str, Any]]
    _join_config: Any = DISABLED

    def join_hook(self, **options: Any) -> JoinHook:
        """What this worker does while others still have batches; see torch's `Joinable`.

        Args:
            options: of other joinables.
        """
        return _StepsWithoutGradients(self)

    @property
    def join_device(self) -> torch.device:
        """Where the buffers of Join's own collectives are."""
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    @property
    def join_process_group(self) -> Any:
        """The workers that wait for each other."""
        return dist.group.WORLD if self.process_group is None else self.process_group

    def _give_notice(self) -> None:
        """Tells workers that have joined that another step is coming."""
        if self._join_config is not DISABLED:
            work = Join.notify_join_context(_as_joinable(self))
            if work is not None:
                work.wait()

    def _take_step(self) -> bool:
        raise NotImplementedError

    def compare_workers(self) -> None:
        """See `ErrorFeedbackOptimizer`."""
        raise NotImplementedError


class _StepsWithoutGradients(JoinHook):
    """Steps of a worker that has run out of batches.

    Args:
        optimizer: of this worker.
    """

    def __init__(self, optimizer: Joining) -> None:
        self._optimizer = optimizer

    def main_hook(self) -> None:
        """One step of the others."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            self._optimizer._take_step()
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


def _as_joinable(optimizer: Any) -> "Joinable":
    joinable: Joinable = optimizer  # in all but name, as its base class needs torch.distributed
    return joinable
