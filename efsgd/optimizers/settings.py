"""The optimizer's arguments: torch.optim.SGD's, with its errors, and this package's own."""

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from efsgd.algorithms.interfaces import Compressor
from efsgd.algorithms.majority_vote import LOCAL_FORM
from efsgd.checks import is_integer, is_number, plain, require_bool, require_choice
from efsgd.engine.overrides import validate_per_parameter
from efsgd.engine.parameters import PER_PARAMETER

#: Names of torch.optim.SGD's settings.
SGD_SETTINGS = (
    "lr",
    "momentum",
    "dampening",
    "weight_decay",
    "nesterov",
    "maximize",
    "foreach",
    "differentiable",
    "fused",
)

# Those of them that are no numbers.
_FLAGS = ("nesterov", "maximize", "foreach", "differentiable", "fused")

#: Settings of the optimizer as a whole. They live in every group, since that is what a
#: state_dict saves, and must be the same in all of them. A compressor may add its own.
SHARED = (
    "error_feedback",
    "start_compressing_at",
    "nonfinite",
    "max_grad_norm",
    "check_every",
    "bucket_bytes",
    "step",
    "worker",
    "world_size",
)

#: What a group notes of its steps and of who took them: no settings.
BOOKKEEPING = ("step", "worker", "world_size", "compressor")

#: Those of them that may differ between workers: whose errors are kept, in which step's company.
LOCAL = ("worker", "world_size")

# What a vote cannot do: it is no estimate of the gradient, and its norm says nothing.
_FIXED_IN_SIGNUM = {
    "momentum_form": LOCAL_FORM,
    "error_feedback": False,
    "start_compressing_at": 0,
    "max_grad_norm": None,
}


def validate_sgd_group(group: Mapping[str, Any], compressor: Compressor) -> None:
    """Checks all settings of a parameter group of an SGD."""
    # torch.optim.SGD's own checks, with its texts, so that code which matches them goes on.
    _require(group, SGD_SETTINGS)
    _validate_numbers(group, ("lr", "momentum", "dampening", "weight_decay"))
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    validate_changes(group, compressor)


def validate_changes(group: Mapping[str, Any], compressor: Compressor) -> None:
    """Checks the settings of a parameter group of an SGD that torch does not look at again."""
    _require(group, (*SGD_SETTINGS, "momentum_form"))
    form = group["momentum_form"]
    require_choice("momentum_form", form, ("paper", "sgd"))
    if form == "paper" and (group["nesterov"] or group["dampening"] != 0):
        raise ValueError(
            f"nesterov={group['nesterov']} and dampening={group['dampening']} belong to "
            f"torch.optim.SGD's momentum, but momentum_form is 'paper' (Algorithm 2, lines 12 and "
            f"13), which has neither. Pass momentum_form='sgd'."
        )
    if form == "paper" and group["fused"]:
        raise ValueError(
            "fused=True asks for torch's fused SGD kernel, but momentum_form is 'paper', which it "
            "cannot compute. Pass momentum_form='sgd', or leave fused out."
        )
    validate_exchange(group, compressor)


def validate_signum_group(group: Mapping[str, Any], compressor: Compressor) -> None:
    """Checks all settings of a parameter group of a Signum."""
    _require(group, ("lr", "momentum", "weight_decay", "maximize", *_FIXED_IN_SIGNUM))
    _validate_numbers(group, ("lr", "momentum", "weight_decay"))
    if group["momentum"] >= 1.0:
        raise ValueError(
            f"Invalid momentum value: {group['momentum']}. Must be at least 0 and below 1: with 1, "
            f"no gradient but the first would ever count."
        )
    for name, value in _FIXED_IN_SIGNUM.items():
        if group[name] != value:
            raise ValueError(
                f"Invalid {name}: {group[name]!r}. Must be {value!r} in a Signum. What differs "
                f"belongs to ErrorFeedbackSGD, and to its state_dicts."
            )
    validate_exchange(group, compressor)


def validate_exchange(group: Mapping[str, Any], compressor: Compressor) -> None:
    """Checks what a parameter group says about the exchange of gradients."""
    _require(group, (*SHARED, PER_PARAMETER, *compressor.settings()))
    for name in ("start_compressing_at", "check_every", *LOCAL, "step"):
        if not is_integer(group[name], 0):
            what = "an integer" if name in LOCAL else "a number of steps"
            raise ValueError(f"Invalid {name}: {group[name]!r}. Must be {what}, at least 0.")
    require_bool("error_feedback", group["error_feedback"])
    require_choice("nonfinite", group["nonfinite"], ("raise", "skip"))
    norm = group["max_grad_norm"]
    if norm is not None and not (is_number(norm) and norm > 0):
        raise ValueError(
            f"Invalid max_grad_norm: {norm!r}. Must be a positive number, math.inf to measure the "
            f"norm alone, or None."
        )
    size = group["bucket_bytes"]
    if size is not None and not is_integer(size, 1):
        raise ValueError(
            f"Invalid bucket_bytes: {size!r}. Must be a number of bytes, at least 1, or None to "
            f"send all gradients together."
        )
    validate_per_parameter(group, compressor)


def _validate_numbers(group: Mapping[str, Any], names: Iterable[str]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name in names:
        number_of(group, name)
    if lr < 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if group["momentum"] < 0.0:
        raise ValueError(f"Invalid momentum value: {group['momentum']}")
    if group["weight_decay"] < 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")


def number_of(group: Mapping[str, Any], name: str) -> float:
    """A setting that must be a finite number, or a tensor of one."""
    value = group[name]
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else plain(value)
    if not isinstance(number, Real):
        raise TypeError(f"Invalid {name}: {value!r}. Must be a number.")
    if not math.isfinite(number):
        raise ValueError(f"Invalid {name}: {number}. Must be finite: every parameter would be NaN.")
    return float(number)


def _require(group: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if name not in group:
            raise ValueError(
                f"Invalid parameter group: it has no {name!r}. A parameter group must keep all the "
                f"settings that the constructor has put there: set it again."
            )


def validate_groups(
    validate: Callable[[Mapping[str, Any], Compressor], None],
    compressor: Compressor,
    groups: Sequence[dict[str, Any]],
) -> None:
    """Checks each group, and that settings of the optimizer as a whole are equal in all.

    Numbers of NumPy and torch in them become Python's own (in place).
    """
    for group in groups:
        _make_plain_(group, {*SHARED, *_FLAGS, *compressor.settings()})
        validate(group, compressor)
        for name in (*SHARED, *compressor.shared_settings()) if group is not groups[0] else ():
            if group[name] != groups[0][name]:
                raise ValueError(
                    f"Invalid {name}: {[each.get(name) for each in groups]} in the parameter "
                    f"groups. It belongs to the optimizer as a whole and must be the same in every "
                    f"group: set it in all of them."
                )


def _make_plain_(group: dict[str, Any], own: Container[str]) -> None:
    """Tensors stay where torch.optim.SGD takes them, which is not so for `own` settings."""
    for name, value in group.items():
        if name in own or not isinstance(value, Tensor):
            group[name] = plain(value)
    overrides = group.get(PER_PARAMETER)
    for name, values in overrides.items() if isinstance(overrides, dict) else ():
        if isinstance(values, list | tuple):
            group[PER_PARAMETER][name] = type(values)(map(plain, values))


def validate_compressor(compressor: object) -> None:
    """Checks that a compressor is one."""
    if isinstance(compressor, type):
        raise TypeError(
            f"Invalid compressor: {compressor!r}. Must be an object, not its class: write "
            f"{compressor.__name__}(...), with its settings."
        )
    if not isinstance(compressor, Compressor):
        raise TypeError(
            f"Invalid compressor: {compressor!r}. Must be an efsgd.compressors.Compressor, for "
            f"example efsgd.PowerSGD(rank=4)."
        )


def kind_of(compressor: object) -> str:
    """What groups note of a compressor: the name of its class."""
    return type(compressor).__name__


def validate_setting_names(compressor: Compressor, taken: Iterable[str]) -> None:
    """Checks that a compressor's settings have other names than the optimizer's, `taken`."""
    names = {"params", "param_names", "initial_lr", "momentum_form", *SGD_SETTINGS, *taken}
    if clash := sorted(names.intersection(compressor.settings())):
        raise ValueError(
            f"Invalid compressor: {kind_of(compressor)} has settings {clash}, which are names of "
            f"the optimizer's own. Settings live in the same parameter groups: rename them."
        )


def validate_parameter(parameter: Tensor, name: str) -> None:
    """Checks that a parameter is of a kind that can be exchanged: not sharded."""
    is_sharded = type(parameter).__name__ == "DTensor" or hasattr(parameter, "placements")
    # FullyShardedDataParallel marks what it has made of parameters, and the parameters themselves.
    is_flat = type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "_fsdp_flattened")
    if is_sharded or is_flat:
        kind = "DTensor, as fully_shard makes it" if is_sharded else "FullyShardedDataParallel"
        raise NotImplementedError(
            f"{name} is sharded ({kind}). The optimizer needs whole parameters on every worker: "
            f"use a plain model or DistributedDataParallel."
        )
