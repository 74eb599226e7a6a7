"""From averaged updates to new parameters, group by group, in the group's momentum form."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd_

from efsgd.compressors import Compressed, Elementwise
from efsgd.control import all_finite
from efsgd.error_feedback import Section, add_multiple_, decompress_with_, descend_
from efsgd.state import Member, State

__all__ = ["apply_updates_", "descend_together_", "sgd_", "sgd_together_"]


def apply_updates_(
    section: Section, mean: Compressed, members: Iterable[Member], states: Mapping[int, State]
) -> None:
    """Updates momenta and parameters.

    Args:
        section: after `commit_`.
        mean: C(Δ), from which Δ' is decompressed.
        members: those parameters of the section that are updated (modified in place).
        states: of each; holds the momenta (modified in place).
    """
    grouped: dict[tuple[int, bool], list[Member]] = {}
    for member in members:
        is_first = not states[member.index].get("momentum_started", True)
        grouped.setdefault((id(member.group), is_first), []).append(member)
    for (identity, is_first), alike in grouped.items():
        group, own = alike[0].group, {member.index: states[member.index] for member in alike}
        operands = [{member.index: member.parameter for member in alike}]
        # Where there is a momentum it is kept up to date even while λ is 0, as line 12 has it.
        has_momentum = all("momentum_buffer" in state for state in own.values())
        if group["momentum_form"] == "sgd":
            has_momentum = group["momentum"] != 0
        if has_momentum:
            operands.append({index: state["momentum_buffer"] for index, state in own.items()})
        is_mixed = (identity, not is_first) in grouped
        function, options = _rule(group, section, is_first=is_first, is_mixed=is_mixed)
        decompress_with_(section, mean, function, *operands, **options)
        if has_momentum and is_first:
            for state in own.values():
                state["momentum_started"].fill_(True)


def _rule(
    group: Mapping[str, Any], section: Section, *, is_first: bool, is_mixed: bool
) -> tuple[Elementwise, dict[str, Any]]:
    """What a group does with its updates, and the settings with which it does it."""
    names = ("lr", "momentum", "weight_decay", "maximize")
    options = {name: _number(group[name]) for name in names}
    foreach = group["foreach"]
    is_together = section.device.type != "cpu" if foreach is None else foreach
    if group["momentum_form"] == "paper":
        return (descend_together_ if is_together else descend_), options
    options |= {"nesterov": group["nesterov"], "dampening": group["dampening"]}
    options["is_first"] = is_first
    # Where only some momenta are begun, torch takes them one by one too; in bfloat16 one sees it.
    if group["fused"] or (is_together and not is_mixed):
        return sgd_together_, options | {"fused": group["fused"], "foreach": foreach}
    return sgd_, options


def descend_together_(
    updates: Sequence[Tensor],
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor] | None = None,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """`error_feedback.descend_` with many tensors in each kernel: for accelerators."""
    updates, parameters = list(updates), list(parameters)
    if maximize:
        torch._foreach_neg_(updates)
    if weight_decay:
        torch._foreach_add_(updates, parameters, alpha=weight_decay)
    steps = updates
    if momenta is not None:
        steps = list(momenta)
        torch._foreach_mul_(steps, momentum)
        torch._foreach_add_(steps, updates)
    torch._foreach_add_(updates, steps)
    torch._foreach_add_(parameters, updates, alpha=-lr)


def sgd_(
    updates: Sequence[Tensor],
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor] | None = None,
    *,
    is_first: bool,
    lr: float | Tensor,
    momentum: float | Tensor,
    dampening: float | Tensor,
    weight_decay: float | Tensor,
    nesterov: bool,
    maximize: bool,
) -> None:
    """torch.optim.SGD's rule, to the bit, without memory of its own.

    Args:
        updates: Δ', each of the shape of its parameter (modified in place).
        parameters: (modified in place).
        momenta: (modified in place); None without momentum.
        is_first: the momenta are not begun yet.
        lr: learning rate.
        momentum: factor of the momenta.
        dampening: what the newest update is dampened by as it enters the momentum.
        weight_decay: multiple of the parameters that is added to the updates.
        nesterov: whether the step looks ahead.
        maximize: ascend instead.
    """
    for position, (x, wide) in enumerate(zip(parameters, updates, strict=True)):
        step = update = _in_dtype_of(x, wide)
        if maximize:
            update.neg_()
        if isinstance(weight_decay, Tensor) or weight_decay != 0:
            add_multiple_(update, weight_decay, x)
        if momenta is not None:
            m = momenta[position]
            if is_first:
                m.copy_(update)
            else:
                add_multiple_(m.mul_(momentum), 1 - dampening, update)
            step = m
            if nesterov:
                add_multiple_(update, momentum, m)
                step = update
        add_multiple_(x, -lr, step)


def sgd_together_(
    updates: Sequence[Tensor],
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor] | None = None,
    *,
    is_first: bool,
    **options: Any,
) -> None:
    """What `sgd_` does, by torch's own function for SGD, with its kernels for many tensors."""
    given = [_in_dtype_of(*pair) for pair in zip(parameters, updates, strict=True)]
    if options["fused"]:  # takes no other strides than the parameter's
        pairs = zip(given, parameters, strict=True)
        given = [u if u.stride() == x.stride() else torch.empty_like(x).copy_(u) for u, x in pairs]
    buffers: list[Tensor | None] = [None] * len(given)
    if momenta is not None and not is_first:
        buffers = list(momenta)
    torch_sgd_(list(parameters), given, buffers, **options)
    if momenta is not None and is_first:  # torch makes a first momentum anew
        for momentum_buffer, made in zip(momenta, buffers, strict=True):
            assert made is not None
            momentum_buffer.copy_(made)


def _in_dtype_of(parameter: Tensor, update: Tensor) -> Tensor:
    """Δ' as torch.optim.SGD would have met it: in the parameter's dtype."""
    cast = update.to(parameter.dtype)
    if parameter.dtype == torch.float16 and not all_finite(cast):
        return update  # a sum of gradients and errors may exceed what float16 can hold
    return cast


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
