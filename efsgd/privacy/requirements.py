"""What private training needs, checked before anything is sent: errors name the remedy."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample import GradSampleHooksFastGradientClipping
from opacus.optimizers import DPOptimizer
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from efsgd.checks import require_choice, require_number
from efsgd.engine.parameters import list_parameters
from efsgd.optimizers.averager import GradientAverager
from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.privacy.accounting import require_sample_rate
from efsgd.privacy.wrapper import Wrapper

OBSERVERS = ("messages", "sum")
#: What a user chooses, equal on all workers.
SETTINGS = ("noise_multiplier", "max_grad_norm", "expected_batch_size", "observer", "sample_rate")
#: -log of how improbable a batch must be to be an error: one in a billion.
_IMPROBABLE = math.log(1e9)


def exchanger_of(optimizer: object, averager: GradientAverager | None) -> ErrorFeedbackOptimizer:
    """Whoever of the two sends gradients, once it is clear that there is one.

    Raises:
        TypeError: there is none, or two.
        ValueError: it has sent gradients without noise already.
    """
    if isinstance(optimizer, DPOptimizer):
        raise TypeError(
            f"Invalid optimizer: {type(optimizer).__name__}, of Opacus. It adds noise itself (with "
            f"DifferentiallyPrivateDistributedDataParallel on worker 0 alone), and sends gradients "
            f"uncompressed. Give the optimizer that is within it, and the plain model to "
            f"opacus.GradSampleModule."
        )
    if isinstance(optimizer, Wrapper):
        raise TypeError(f"Invalid optimizer: this {type(optimizer).__name__} is private already.")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"Invalid optimizer: {type(optimizer).__name__}. Must be an optimizer.")
    is_ours = isinstance(optimizer, ErrorFeedbackOptimizer)
    if is_ours and averager is not None:
        raise TypeError(
            f"{type(optimizer).__name__} exchanges gradients itself. Leave out averager, which is "
            f"for optimizers that do not."
        )
    exchanger = optimizer if averager is None else averager
    if not isinstance(exchanger, ErrorFeedbackOptimizer) or (
        averager is not None and not isinstance(averager, GradientAverager)
    ):
        raise TypeError(
            f"{type(optimizer).__name__} does not exchange gradients between workers. Give "
            f"averager=GradientAverager(model.parameters()) as well, or use PowerSGDOptimizer."
        )
    if exchanger.engine.preparations:
        raise ValueError(
            f"This {type(exchanger).__name__} belongs to a PrivateOptimizer already, which adds "
            f"noise. Construct another one."
        )
    require_no_errors(exchanger.state, exchanger, "has taken steps without noise")
    return exchanger


def require_no_errors(states: Any, exchanger: ErrorFeedbackOptimizer, why: str) -> None:
    """Raises ValueError where errors hold gradients to which nobody has added noise.

    `states` are those of parameters by some key, or what a state_dict has in their place.
    """
    for own in states.values() if isinstance(states, Mapping) else ():
        for name in ("error", *exchanger.compressor.local_state):
            value = own.get(name) if isinstance(own, Mapping) else None
            if isinstance(value, torch.Tensor) and bool(value.any()):
                raise ValueError(
                    f"This {type(exchanger).__name__} {why}: what it has yet to send, its error "
                    f"feedback or local momentum, holds gradients of single records, and later "
                    f"messages would give them away whatever noise they have. Construct a new one, "
                    f"and load checkpoints of private training through PrivateOptimizer."
                )


def require_settings(settings: Mapping[str, Any]) -> None:
    """Raises ValueError where one of `SETTINGS` is out of range."""
    remedy = "It is the standard deviation of noise in multiples of max_grad_norm."
    require_number("noise_multiplier", settings["noise_multiplier"], remedy=remedy)
    remedy = "It is the norm to which the gradient of each record is clipped."
    require_number("max_grad_norm", settings["max_grad_norm"], above=0, remedy=remedy)
    remedy = "It is the expected number of records in a step of all workers together."
    require_number("expected_batch_size", settings["expected_batch_size"], above=0, remedy=remedy)
    require_choice("observer", settings["observer"], OBSERVERS)
    if settings["sample_rate"] is not None:
        require_sample_rate(settings["sample_rate"])


def require_averaging(observer: str, exchanger: ErrorFeedbackOptimizer) -> None:
    """Raises ValueError where sums are not all that is seen, or not of what they should be."""
    if observer == "sum" and not exchanger.compressor.claims().averages:
        raise ValueError(
            f"observer='sum', but {type(exchanger.compressor).__name__} gathers: every worker gets "
            f"every message, not only their sum. Use observer='messages', or a compressor that "
            f"averages: PowerSGD, RandomK or RandomBlock."
        )
    if exchanger.weight != 1.0:
        raise ValueError(
            f"weight={exchanger.weight!r}. Must be 1.0: all workers divide by the same expected "
            f"batch size, since true ones tell who has taken part."
        )


def require_dtypes(groups: list[dict[str, Any]]) -> None:
    """Raises ValueError where gradients of a parameter cannot be clipped as they must be."""
    for info in list_parameters(groups):
        dtype = info.parameter.dtype
        if info.is_trained and dtype not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(
                f"{info.name} is {str(dtype).removeprefix('torch.')}: norms of gradients overflow "
                f"in it, and clipping would bound nothing. Use float32 or bfloat16 parameters."
            )


def require_module(module: nn.Module | None) -> bool:
    """Checks the model whose gradients are read, where it was given.

    Returns:
        Whether it leaves sums of clipped gradients (ghost clipping), in place of one per record.
    """
    if module is None:
        return False
    hooks: Any = module
    inner = getattr(hooks, "_module", module)
    for name, part in inner.named_modules():
        where = f"The module {name!r}" if name else "The model"
        kind = type(part).__name__
        if isinstance(part, DifferentiallyPrivateDistributedDataParallel | DistributedDataParallel):
            raise TypeError(
                f"{where} is a {kind}. Gradients must not be averaged, nor noise be added, before "
                f"they are compressed: wrap the plain model in opacus.GradSampleModule, and start "
                f"workers equal with optimizer.broadcast_parameters()."
            )
        if isinstance(part, _BatchNorm):
            raise TypeError(
                f"{where} is a {kind}, which mixes the records of a batch: no gradient belongs to "
                f"one of them. Use nn.GroupNorm, for example by opacus.validators.ModuleValidator."
            )
    return isinstance(module, GradSampleHooksFastGradientClipping)


def require_same_norm(module: nn.Module | None, max_grad_norm: float) -> None:
    """Raises ValueError where a model with ghost clipping clips to another norm."""
    if not isinstance(module, GradSampleHooksFastGradientClipping):
        return
    if module.max_grad_norm != max_grad_norm:
        raise ValueError(
            f"The model clips to {module.max_grad_norm}, but max_grad_norm is {max_grad_norm}: the "
            f"noise would not fit what is sent. Give both the same."
        )


def require_all_averaged(optimizer: Optimizer, averager: GradientAverager) -> None:
    """Raises ValueError where an optimizer would apply gradients without noise."""
    averaged = {p for p in _parameters(averager.param_groups) if p.requires_grad}
    missing = [
        position
        for position, parameter in enumerate(_parameters(optimizer.param_groups))
        if (parameter.requires_grad or parameter.grad is not None) and parameter not in averaged
    ]
    if missing:
        raise ValueError(
            f"Parameters {missing} of {type(optimizer).__name__} are not in the averager, or were "
            f"frozen with a gradient: it would be applied without noise. Give both the same "
            f"parameters, and call zero_grad() where one is frozen."
        )


def _parameters(groups: Iterable[dict[str, Any]]) -> list[torch.Tensor]:
    return [parameter for group in groups for parameter in group["params"]]


def require_probable(records: int, expected: float, steps: int) -> None:
    """Raises ValueError where so many records cannot be a matter of chance.

    Shards may differ in size: twice the mean is allowed.

    Args:
        records: of this worker.
        expected: how many are declared for those steps, at most.
        steps: over how many steps.
    """
    if records <= expected:
        return
    # Chernoff's bound for a Poisson distribution.
    if records * math.log(records / expected) - records + expected > _IMPROBABLE:
        over = "a batch" if steps == 1 else f"{steps} batches"
        raise ValueError(
            f"{records} records in {over} of this worker, where expected_batch_size allows for "
            f"{expected:g}. It is the number of records in a step of all workers together, and no "
            f"record takes part twice: declare more, or draw batches with poisson_batches."
        )
