"""From averaged updates to new parameters, group by group, in the group's momentum form."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd_

from efsgd.error_feedback import descend_
from efsgd.state import Member, State

__all__ = ["apply_updates_"]


def apply_updates_(
    members: Iterable[Member], states: Mapping[int, State], updates: Mapping[int, Tensor]
) -> None:
    """Updates momenta and parameters.

    Args:
        members: the optimizer's parameters (modified in place).
        states: of each; holds the momenta (modified in place).
        updates: Δ' by index, in the parameters' shapes (modified in place). A parameter without
            one is left alone, and so is its momentum.
    """
    grouped: dict[int, list[Member]] = {}
    for member in members:
        if member.index in updates:
            grouped.setdefault(id(member.group), []).append(member)
    for alike in grouped.values():
        own = [states[member.index] for member in alike]
        given = [updates[m.index].to(m.parameter.dtype) for m in alike]
        _update_group_([m.parameter for m in alike], given, own, alike[0].group)


def _update_group_(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    states: Sequence[State],
    group: Mapping[str, Any],
) -> None:
    has_momentum = group["momentum"] != 0
    if group["momentum_form"] == "paper":
        momenta = [state["momentum_buffer"] for state in states] if has_momentum else None
        names = ("lr", "momentum", "weight_decay", "maximize")
        descend_(parameters, updates, momenta, **{name: _number(group[name]) for name in names})
    else:
        _torch_update_(list(parameters), list(updates), states, group)
    if has_momentum:
        for state in states:
            if not state["momentum_started"]:
                state["momentum_started"].fill_(True)


def _torch_update_(
    parameters: list[Tensor],
    updates: list[Tensor],
    states: Sequence[State],
    group: Mapping[str, Any],
) -> None:
    """torch.optim.SGD's own function, so that its rule is followed to the bit."""
    buffers: list[Tensor | None] = [None] * len(states)
    if group["momentum"] != 0:
        buffers = [s["momentum_buffer"] if s["momentum_started"] else None for s in states]
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    options = {name: group[name] for name in (*names, "foreach", "fused")}
    torch_sgd_(parameters, updates, (first := list(buffers)), **options)
    for state, before, after in zip(states, buffers, first, strict=True):
        if before is None and after is not None:  # a first momentum, which torch has made anew
            state["momentum_buffer"].copy_(after)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
