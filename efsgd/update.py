"""From averaged updates to new parameters, group by group, in the group's momentum form."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd_

from efsgd.control import all_finite
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
        given = [updates[member.index] for member in alike]
        own = [states[member.index] for member in alike]
        if group["momentum_form"] == "sgd":
            given = [_like(*pair, group) for pair in zip(given, parameters, strict=True)]
            _torch_update_(parameters, given, own, group)
            continue
        # Where there is a momentum it is kept up to date even while λ is 0, as line 12 has it.
        has_momentum = all("momentum_buffer" in state for state in own)
        momenta = [state["momentum_buffer"] for state in own] if has_momentum else None
        names = ("lr", "momentum", "weight_decay", "maximize")
        descend_(parameters, given, momenta, **{name: _number(group[name]) for name in names})
        if has_momentum:
            _mark_started_(own)


def _like(update: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Δ' as torch.optim.SGD would have met it: in the parameter's dtype and, fused, its strides."""
    cast = update.to(parameter.dtype)
    if parameter.dtype == torch.float16 and not all_finite(cast):
        return update  # a sum of gradients and errors may exceed what float16 can hold
    if group["fused"] and cast.stride() != parameter.stride():
        return torch.empty_like(parameter).copy_(cast)
    return cast


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
