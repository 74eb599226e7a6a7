"""Uses of an optimizer by torch that cannot work between several workers, and are refused."""

from torch.optim import Optimizer


def refuse_backward_optimizer(optimizer: Optimizer) -> None:
    """Raises where `optimizer` was made for steps of single parameters within the backward pass.

    Several workers need not finish their gradients in the same order, and would wait for ever.
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
