"""Uses of an optimizer by torch that cannot work between several workers, and are refused."""

import sys
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer

#: How many calls up a constructor is looked for: ours, those of subclasses, and ZeRO's own two.
_DEPTH = 12


def refuse_sharding_optimizer() -> None:
    """Raises where an optimizer is being made by torch's ZeroRedundancyOptimizer for its shard.

    That gives each worker other parameters, and averages nothing: gradients have to be averaged
    before. Where shards have equal shapes nothing else would show it.

    Raises:
        NotImplementedError: it is so, and there are several workers.
    """
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        caller: Any = frame.f_locals.get("self")
        if type(caller).__name__ == "ZeroRedundancyOptimizer":
            if dist.get_world_size(caller.process_group) > 1:
                raise NotImplementedError(
                    "ZeroRedundancyOptimizer gives each worker a part of the parameters, but this "
                    "optimizer exchanges the gradients of all of them, and needs the same "
                    "parameters on every worker. Construct it directly, without "
                    "ZeroRedundancyOptimizer."
                )
            return
        if frame.f_back is None:
            return
        frame = frame.f_back


def refuse_backward_optimizer(optimizer: Optimizer) -> None:
    """Raises where `optimizer` was made for steps of single parameters within the backward pass.

    Several workers need not finish their gradients in the same order, and would wait for ever.

    Raises:
        NotImplementedError: it is so.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for other in getattr(parameter, "_in_backward_optimizers", ()):
                if other is optimizer:
                    raise NotImplementedError(
                        "_apply_optimizer_in_backward makes an optimizer for each parameter, which "
                        "steps as soon as its gradient is there. With several workers all "
                        "parameters must be exchanged together: construct one optimizer for all "
                        "of them, and call step() after the backward pass."
                    )
