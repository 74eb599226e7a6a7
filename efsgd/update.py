"""From averaged updates to new parameters, group by group, in the group's momentum form."""

from collections.abc import Iterable, Mapping
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
        group, parameters = alike[0].group, [member.parameter for member in alike]
        given = [updates[member.index].to(member.parameter.dtype) for member in alike]
        own = [states[member.index] for member in alike]
        if group["momentum_form"] == "sgd":
            _torch_update_(parameters, given, own, group)
            continue
        has_momentum = group["momentum"] != 0
        momenta = [state["momentum_buffer"] for state in own] if has_momentum else None
        names = ("lr", "momentum", "weight_decay", "maximize")
        descend_(parameters, given, momenta, **{name: _number(group[name]) for name in names})
        if has_momentum:
            _mark_started_(own)


def _torch_update_(
    parameters: list[Tensor],
    updates: list[Tensor],
    states: list[State],
    group: Mapping[str, Any],
) -> None:
    """torch.optim.SGD's own function, so that its rule is followed to the bit."""
    has_momentum = group["momentum"] != 0
    started = [has_momentum and bool(state["momentum_started"]) for state in states]
    if group["fused"] and has_momentum and len(set(started)) > 1:
        # torch's fused kernel takes no mixture of first and later momenta.
        for some in (True, False):
            at = [position for position, is_so in enumerate(started) if is_so == some]
            xs, deltas = [parameters[i] for i in at], [updates[i] for i in at]
            _torch_update_(xs, deltas, [states[i] for i in at], group)
        return
    buffers = [
        state["momentum_buffer"] if is_started else None
        for state, is_started in zip(states, started, strict=True)
    ]
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    options = {name: group[name] for name in (*names, "foreach", "fused")}
    torch_sgd_(parameters, updates, buffers, **options)
    for state, is_started, made in zip(states, started, buffers, strict=True):
        if made is not None and not is_started:  # torch makes a first momentum anew
            state["momentum_buffer"].copy_(made)
    if has_momentum:
        _mark_started_(states)


def _mark_started_(states: Iterable[State]) -> None:
    for state in states:
        if not state["momentum_started"]:
            state["momentum_started"].fill_(True)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value
