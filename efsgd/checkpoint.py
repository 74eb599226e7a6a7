"""One checkpoint for any number of workers.

`optimizer.state_dict()` belongs to one worker: its errors are its own, and loading each worker's
dict on the same number of workers continues a run to the bit. What the other workers need of
a worker's errors is only their mean: everything that is ever sent depends on the workers through
the mean of gradient and error alone, as far as the compressor is linear. So a dict that holds the
mean of the errors, loaded on every worker, continues the run on any number of them: exactly but for
rounding with PowerSGD, and with every compressor without losing anything of what was to be sent.
"""

import copy
from typing import Any

import torch
from torch import Tensor

from efsgd.collectives import AllReduceMean, Exchange, run
from efsgd.optimizer_base import ErrorFeedbackOptimizer
from efsgd.transports import current_transport

__all__ = ["consolidated_state_dict", "consolidation"]


def consolidated_state_dict(optimizer: ErrorFeedbackOptimizer) -> dict[str, Any]:
    """A state_dict that can be loaded on any number of workers.

    Every worker of the optimizer's group must call it, between the same two steps. All get equal
    dicts, so it suffices that one of them saves it. Load it on every worker with
    `optimizer.load_state_dict`.

    Args:
        optimizer: not modified.

    Returns:
        A copy of `optimizer.state_dict()` in which every error is the mean over the workers.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.checkpoint import consolidated_state_dict
        >>> model = torch.nn.Linear(32, 32)
        >>> optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1)
        >>> optimizer.load_state_dict(consolidated_state_dict(optimizer))
    """
    return run(consolidation(optimizer), current_transport(optimizer.process_group))


@torch.no_grad()
def consolidation(optimizer: ErrorFeedbackOptimizer) -> Exchange[dict[str, Any]]:
    """`consolidated_state_dict` as an exchange, for any driver."""
    state_dict = copy.deepcopy(optimizer.state_dict())
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for _, state in sorted(state_dict["state"].items(), key=lambda item: str(item[0])):
        error = state.get("error")
        if error is not None:
            kinds.setdefault((error.device, error.dtype), []).append(error)
    for errors in kinds.values():
        means = yield AllReduceMean(torch.cat([e.reshape(-1) for e in errors]), "errors")
        for error, mean in zip(errors, means.split([e.numel() for e in errors]), strict=True):
            error.copy_(mean.view(error.shape))
    for group in state_dict["param_groups"]:
        group.update(worker=0, world_size=0)  # these errors are nobody's own
    return state_dict
