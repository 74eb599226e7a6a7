"""Error-feedback SGD as a torch.optim.Optimizer, for any compressor."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import ParamsT

from efsgd.algorithms.error_feedback import descend_
from efsgd.algorithms.interfaces import Compressor
from efsgd.algorithms.sgd import sgd_
from efsgd.compressors import PowerSGD
from efsgd.engine.update import Rule, Rules
from efsgd.layout import Elementwise
from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.optimizers.differentiable import require_differentiable
from efsgd.optimizers.settings import (
    SGD_SETTINGS,
    number_of,
    validate_changes,
    validate_sgd_group,
)
from efsgd.wire.collectives import leave_modes
from efsgd.wire.transports import Workers


def rules_of(groups: Iterable[Mapping[str, Any]]) -> Rules:
    """SGD's rules, in each group's momentum form; `differentiable` goes another way."""
    rules = {}
    for group in groups:
        if group["differentiable"]:
            raise NotImplementedError(
                "differentiable=True: a step cannot be differentiated through communication "
                "between workers. Use one worker, or torch.optim.SGD."
            )
        options: dict[str, Any] = {
            "lr": number_of(group, "lr"),
            "momentum": number_of(group, "momentum"),
            "weight_decay": number_of(group, "weight_decay") or None,
            "maximize": group["maximize"],
            "together": group["foreach"],
        }
        function: Elementwise = descend_
        if group["momentum_form"] == "sgd":
            function = sgd_
            options["nesterov"], options["foreach"] = group["nesterov"], group["foreach"]
            options["fused"], options["dampening"] = group["fused"], number_of(group, "dampening")
            options["together"] = True if group["fused"] else group["foreach"]
        if group["max_grad_norm"] is not None:
            options["clip"] = 1.0
        # In the paper's form m is kept up to date even while λ is 0, as line 12 has it.
        keeps_momentum = group["momentum_form"] == "paper" or group["momentum"] != 0
        rules[id(group)] = Rule(function, options, keeps_momentum)
    return rules


class ErrorFeedbackSGD(ErrorFeedbackOptimizer):
    """Distributed error-feedback SGD with momentum: Algorithm 2 of PowerSGD, any compressor.

    `step()` takes each worker's own gradients, adds what was not sent before, compresses, averages
    over the workers, and updates. What the compressor leaves alone is averaged as it is.

    The other arguments are those of `PowerSGDOptimizer`, which is the case
    `compressor=PowerSGD(...)`.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        compressor: what is sent; None is `PowerSGD()`.

    Raises:
        ValueError: an argument is out of range, or two of them contradict each other.
    """

    # torch.amp.GradScaler then calls `step` on every worker, also on one whose gradients have
    # overflowed, and the workers decide together.
    _step_supports_amp_scaling = True

    _keeps_momentum = True
    _telling_settings = ("dampening", "error_feedback")
    _validate = staticmethod(validate_sgd_group)
    _validate_again = staticmethod(validate_changes)
    _rules = staticmethod(rules_of)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        compressor: Compressor | None = None,
        momentum_form: str = "paper",
        error_feedback: bool = True,
        start_compressing_at: int = 0,
        nonfinite: str = "raise",
        max_grad_norm: float | None = None,
        check_every: int = 0,
        bucket_bytes: int | None = None,
        process_group: Workers = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "momentum_form": momentum_form,
            "error_feedback": error_feedback,
            "start_compressing_at": start_compressing_at,
            "nonfinite": nonfinite,
            "max_grad_norm": max_grad_norm,
            "check_every": check_every,
            "bucket_bytes": bucket_bytes,
        }
        compressor = PowerSGD() if compressor is None else compressor
        super().__init__(params, defaults, compressor, process_group)
        if differentiable:
            require_differentiable(self.param_groups, compressor)

    @classmethod
    @leave_modes()
    def from_sgd(cls, sgd: SGD, **options: Any) -> Self:
        """Takes over from a live torch.optim.SGD: same groups, same momenta, same update rule.

        The momentum buffers are shared, not copied: `sgd` is not to be used any more. Learning
        rate schedulers must be made anew, for the new optimizer.

        Args:
            sgd: the optimizer to replace.
            options: this package's own arguments (`rank=4`, ...); `momentum_form` is "sgd".
        """
        if not isinstance(sgd, SGD):
            raise TypeError(f"Invalid sgd: {type(sgd).__name__}. Must be a torch.optim.SGD.")
        if given := sorted(set(SGD_SETTINGS) & options.keys()):
            raise TypeError(
                f"Invalid options: {given}. They are taken over from the SGD; set them in the "
                f"param_groups of either."
            )
        defaults = {name: sgd.defaults[name] for name in SGD_SETTINGS}
        groups = [{**group, "params": list(group["params"])} for group in sgd.param_groups]
        optimizer = cls(groups, **defaults, **{"momentum_form": "sgd", **options})
        for parameter, state in sgd.state.items():
            buffer = state.get("momentum_buffer")
            if buffer is not None:
                own = optimizer.state[parameter]
                own["momentum_buffer"], own["momentum_started"] = (
                    buffer,
                    torch.tensor(True, device="cpu"),
                )
        return optimizer
