"""From averaged updates to new parameters, group by group, in the group's momentum form."""

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd_

from efsgd.blocks import Elementwise
from efsgd.compressors import Aggregator, Compressed
from efsgd.error_feedback import Section, add_multiple_, decompress_with_, descend_, regularize_
from efsgd.state import Member, State

__all__ = ["Rule", "apply_updates_", "prepare_updates", "rules_of", "sgd_"]


@dataclass(frozen=True)
class Rule:
    """How a group updates its parameters. Made before anything is sent, so that it can be refused.

    Attributes:
        function: updates parameters and momenta.
        options: of `function`.
    """

    function: Elementwise
    options: Mapping[str, Any]

    @property
    def kind(self) -> Hashable:
        """The same for rules that differ in their numbers only."""
        flags = ((k, "a number" if type(v) is float else v) for k, v in self.options.items())
        return self.function, tuple(flags)


def rules_of(groups: Iterable[Mapping[str, Any]]) -> dict[int, Rule]:
    """The rules of parameter groups, by the groups' ids.

    Raises:
        TypeError: a setting is not a number.
        ValueError: it is not finite.
    """
    rules = {}
    for group in groups:
        options: dict[str, Any] = {name: _number(group, name) for name in ("lr", "momentum")}
        options["weight_decay"] = _number(group, "weight_decay") or None
        foreach = group["foreach"]
        on_cpu = all(parameter.is_cpu for parameter in group["params"])
        options |= {"maximize": group["maximize"], "together": not on_cpu}
        if foreach is not None:
            options["together"] = foreach
        function: Elementwise = descend_
        if group["momentum_form"] == "sgd":
            function = sgd_
            options |= {name: group[name] for name in ("nesterov", "foreach", "fused")}
            options["dampening"] = _number(group, "dampening")
            options["together"] = options["together"] or bool(group["fused"])
        rules[id(group)] = Rule(function, options)
    return rules


@dataclass(frozen=True)
class _Job:
    """Parameters of one group that are updated alike, with their momenta, and how."""

    operands: Sequence[dict[int, Tensor]]
    started: Sequence[Tensor]
    function: Elementwise
    options: dict[str, Any]


def _jobs(
    members: Iterable[Member], states: Mapping[int, State], rules: Mapping[int, Rule]
) -> Iterator[_Job]:
    grouped: dict[tuple[int, bool, bool], list[Member]] = {}
    for member in members:
        state = states[member.index]
        # In the paper's form m is kept up to date even while λ is 0, as line 12 has it.
        is_paper = member.group["momentum_form"] == "paper"
        has_momentum = "momentum_buffer" in state and (is_paper or member.group["momentum"] != 0)
        is_first = has_momentum and not state["momentum_started"]
        grouped.setdefault((id(member.group), has_momentum, is_first), []).append(member)
    for (identity, has_momentum, is_first), alike in grouped.items():
        rule, own = rules[identity], {member.index: states[member.index] for member in alike}
        operands = [{member.index: member.parameter for member in alike}]
        options = dict(rule.options)
        if rule.function is sgd_:
            options["is_first"] = is_first
            # Where only some momenta are begun, torch takes them one by one; bfloat16 shows it.
            is_mixed = (identity, has_momentum, not is_first) in grouped
            options["together"] = options["together"] and (options["fused"] or not is_mixed)
        if has_momentum:
            operands.append({index: state["momentum_buffer"] for index, state in own.items()})
        started = [state["momentum_started"] for state in own.values()] if is_first else []
        yield _Job(operands, started, rule.function, options)


def apply_updates_(
    section: Section,
    mean: Compressed,
    members: Iterable[Member],
    states: Mapping[int, State],
    rules: Mapping[int, Rule],
) -> None:
    """Updates momenta and parameters.

    Args:
        section: after `commit_`.
        mean: C(Δ), from which Δ' is decompressed.
        members: those parameters of the section that are updated (modified in place).
        states: of each; holds the momenta (modified in place).
        rules: of `rules_of`.
    """
    for job in _jobs(members, states, rules):
        decompress_with_(section, mean, job.function, *job.operands, **job.options)
        for flag in job.started:
            flag.fill_(True)


def prepare_updates(
    aggregator: Aggregator,
    members: Iterable[Member],
    states: Mapping[int, State],
    rules: Mapping[int, Rule],
) -> None:
    """Has an aggregator make ready, compile perhaps, all that `apply_updates_` will need.

    Args:
        aggregator: fresh.
        members: the parameters it works for.
        states: of each.
        rules: of `rules_of`.
    """
    for job in _jobs(members, states, rules):
        aggregator.prepare(job.function, job.operands, job.options)
        if job.options.get("is_first"):
            later = job.options | {"is_first": False}
            aggregator.prepare(job.function, job.operands, later)


def sgd_(
    updates: Sequence[Tensor],
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor] | None = None,
    *,
    is_first: bool,
    lr: float | Tensor,
    momentum: float | Tensor,
    dampening: float | Tensor,
    nesterov: bool,
    weight_decay: float | Tensor | None = None,
    maximize: bool = False,
    together: bool = False,
    foreach: bool | None = None,
    fused: bool | None = None,
) -> None:
    """torch.optim.SGD's rule, to the bit except for float16 parameters.

    Those are updated from float32: a sum of gradients and errors may exceed what float16 holds.

    Args:
        updates: Δ', each of the shape of its parameter (modified in place).
        parameters: (modified in place).
        momenta: (modified in place); None without momentum.
        is_first: the momenta are not begun yet.
        lr: learning rate.
        momentum: factor of the momenta.
        dampening: what the newest update is dampened by as it enters the momentum.
        nesterov: whether the step looks ahead.
        weight_decay: multiple of the parameters that is added to the updates.
        maximize: ascend instead.
        together: whether torch's own function does it, with its kernels for many tensors.
        foreach: which of them; see torch.optim.SGD.
        fused: the same.
    """
    pairs = list(zip(parameters, updates, strict=True))
    given = [u if x.dtype == torch.float16 else u.to(x.dtype) for x, u in pairs]
    if together and all(x.dtype == u.dtype for x, u in zip(parameters, given, strict=True)):
        kernels = {"foreach": foreach, "fused": fused}
        numbers = {"lr": lr, "momentum": momentum, "dampening": dampening}
        flags = {"nesterov": nesterov, "weight_decay": weight_decay or 0, "maximize": maximize}
        own = None if is_first else momenta
        _by_torch_(given, list(parameters), own, momenta, **numbers, **flags, **kernels)
        return
    for position, (x, update) in enumerate(zip(parameters, given, strict=True)):
        regularize_(update, x, weight_decay=weight_decay, maximize=maximize)
        step = update
        if momenta is not None:
            step = m = momenta[position]
            if is_first:
                m.copy_(update)
            else:
                add_multiple_(m.mul_(momentum), 1 - dampening, update)
            if nesterov:
                add_multiple_(update, momentum, m)
                step = update
        add_multiple_(x, -lr, step)


def _by_torch_(
    updates: list[Tensor],
    parameters: list[Tensor],
    begun: Sequence[Tensor] | None,
    momenta: Sequence[Tensor] | None,
    **options: Any,
) -> None:
    if options["fused"]:  # takes no other strides than the parameter's
        pairs = zip(updates, parameters, strict=True)
        updates = [
            u if u.stride() == x.stride() else torch.empty_like(x).copy_(u) for u, x in pairs
        ]
    buffers: list[Tensor | None] = [None] * len(updates) if begun is None else list(begun)
    torch_sgd_(parameters, updates, buffers, **options)
    if begun is None and momenta is not None:  # torch makes a first momentum anew
        for momentum_buffer, made in zip(momenta, buffers, strict=True):
            assert made is not None
            momentum_buffer.copy_(made)


def _number(group: Mapping[str, Any], name: str) -> float:
    value = group[name]
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"Invalid {name}: {value!r}. Must be a number.") from None
    if not math.isfinite(number):
        raise ValueError(f"Invalid {name}: {number}. Must be finite: every parameter would be NaN.")
    return number
