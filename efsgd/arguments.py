"""The optimizer's arguments: torch.optim.SGD's, with its errors, and this package's own."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = [
    "SGD_SETTINGS",
    "SHARED",
    "validate_group",
    "validate_own_settings",
    "validate_parameter",
    "validate_shared",
]

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

#: Settings of the optimizer as a whole. They live in every group, since that is what a
#: state_dict saves, and must be the same in all of them. A compressor may add its own.
SHARED = ("error_feedback", "start_compressing_at", "nonfinite", "step")


def validate_group(group: Mapping[str, Any]) -> None:
    """Checks the settings of one parameter group that are not the compressor's.

    Raises:
        ValueError: a value is out of range, or two settings contradict each other.
        RuntimeError: `fused` is asked for together with `differentiable` or `foreach`.
        NotImplementedError: `differentiable=True`.
    """
    _validate_sgd(group)
    validate_own_settings(group)


def validate_own_settings(group: Mapping[str, Any]) -> None:
    """Checks those settings of a group that torch.optim.SGD has not, or not in this combination.

    Raises:
        ValueError: a value is out of range, or two settings contradict each other.
        NotImplementedError: `differentiable=True`.
    """
    form = group["momentum_form"]
    if form not in ("paper", "sgd"):
        raise ValueError(f"Invalid momentum_form: {form!r}. Must be 'paper' or 'sgd'.")
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
    if group["differentiable"]:
        raise NotImplementedError(
            "differentiable=True is not supported: a step cannot be differentiated through its "
            "communication. Use torch.optim.SGD for that."
        )
    start = group["start_compressing_at"]
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise ValueError(
            f"Invalid start_compressing_at: {start!r}. Must be a number of steps, at least 0."
        )
    if not isinstance(group["error_feedback"], bool):
        raise ValueError(f"Invalid error_feedback: {group['error_feedback']!r}. Must be a bool.")
    if group["nonfinite"] not in ("raise", "skip"):
        raise ValueError(f"Invalid nonfinite: {group['nonfinite']!r}. Must be 'raise' or 'skip'.")


def _validate_sgd(group: Mapping[str, Any]) -> None:
    """torch.optim.SGD's own checks, with its texts, so that code which matches them goes on."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if lr < 0.0:
        raise ValueError(f"Invalid learning rate: {lr}")
    if group["momentum"] < 0.0:
        raise ValueError(f"Invalid momentum value: {group['momentum']}")
    if group["weight_decay"] < 0.0:
        raise ValueError(f"Invalid weight_decay value: {group['weight_decay']}")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def validate_shared(groups: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Checks that settings of the optimizer as a whole are equal in all groups.

    Args:
        groups: all of them.
        names: of those settings.

    Raises:
        ValueError: names the first setting that is not.
    """
    for name in names:
        values = [group[name] for group in groups]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"Invalid {name}: {values} in the parameter groups. It belongs to the optimizer as "
                f"a whole and must be the same in every group; pass it to the constructor."
            )


def validate_parameter(parameter: Tensor, name: str) -> None:
    """Checks that a parameter is of a kind that can be exchanged.

    Raises:
        NotImplementedError: complex parameters, and parameters sharded by FSDP or DTensor.
    """
    if parameter.is_complex():
        raise NotImplementedError(
            f"{name} is complex. Register its real view instead: torch.view_as_real(parameter)."
        )
    if type(parameter).__name__ == "DTensor" or hasattr(parameter, "placements"):
        raise NotImplementedError(
            f"{name} is sharded (DTensor). The optimizer needs whole parameters on every worker: "
            f"use a plain model or DistributedDataParallel."
        )
