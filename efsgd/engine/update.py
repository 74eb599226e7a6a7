"""From averaged updates to new parameters, group by group."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.error_feedback import decompress_with_
from efsgd.algorithms.interfaces import Aggregator, Compressed
from efsgd.algorithms.sgd import sgd_
from efsgd.engine.parameters import ParameterInfo
from efsgd.engine.state import State
from efsgd.layout import Elementwise, real_view


@dataclass(frozen=True)
class Rule:
    """How a group updates its parameters. Made before anything is sent, so that it can be refused.

    Attributes:
        function: updates parameters and momenta.
        options: of `function`.
        keeps_momentum: whether momenta, where there are any, are updated with the parameters.
        writes_gradients: whether `function` is given gradients in place of parameters.
    """

    function: Elementwise
    options: Mapping[str, Any]
    keeps_momentum: bool = True
    writes_gradients: bool = False

    @property
    def kind(self) -> Hashable:
        """The same for rules that differ in their numbers only."""
        flags = ((k, "a number" if type(v) is float else v) for k, v in self.options.items())
        return self.function, tuple(flags)


#: The rules of parameter groups, by the groups' ids.
Rules: TypeAlias = Mapping[int, Rule]


@dataclass(frozen=True)
class _Job:
    """Parameters of one group that are updated alike, with their momenta, and how."""

    operands: Sequence[Mapping[int, Tensor]]
    started: Sequence[Tensor]
    function: Elementwise
    options: dict[str, Any]


def _jobs(
    infos: Iterable[ParameterInfo],
    states: Mapping[int, State],
    rules: Rules,
    target: Callable[[ParameterInfo, Rule], Tensor],
) -> Iterator[_Job]:
    grouped: dict[tuple[int, bool, bool], list[ParameterInfo]] = {}
    for info in infos:
        state = states[info.index]
        has_momentum = "momentum_buffer" in state and rules[id(info.group)].keeps_momentum
        is_first = has_momentum and not state["momentum_started"]
        grouped.setdefault((id(info.group), has_momentum, is_first), []).append(info)
    for (identity, has_momentum, is_first), alike in grouped.items():
        rule, own = rules[identity], {info.index: states[info.index] for info in alike}
        operands = [{info.index: target(info, rule) for info in alike}]
        options = dict(rule.options)
        if rule.function is sgd_:
            options["is_first"] = is_first
            # Where only some momenta are begun, torch takes them one by one; bfloat16 shows it.
            is_mixed = (identity, has_momentum, not is_first) in grouped
            options["together"] = options["together"] and (options["fused"] or not is_mixed)
        if has_momentum:
            momenta = {i: real_view(state["momentum_buffer"]) for i, state in own.items()}
            operands.append(momenta)
        started = [state["momentum_started"] for state in own.values()] if is_first else []
        yield _Job(operands, started, rule.function, options)


def apply_updates_(
    bucket: Bucket,
    mean: Compressed,
    infos: Iterable[ParameterInfo],
    states: Mapping[int, State],
    rules: Rules,
    **changes: float,
) -> None:
    """Updates momenta and parameters.

    Args:
        bucket: after `commit_`.
        mean: C(Δ), from which Δ' is decompressed.
        infos: those parameters of the bucket that are updated (modified in place).
        states: of each; holds the momenta (modified in place).
        rules: of `rules_of`.
        changes: replace options of the rules.
    """
    for job in _jobs(infos, states, rules, _target):
        decompress_with_(bucket, mean, job.function, *job.operands, **job.options | changes)
        for flag in job.started:
            flag.fill_(True)


def prepare_updates(
    aggregator: Aggregator,
    infos: Iterable[ParameterInfo],
    states: Mapping[int, State],
    rules: Rules,
) -> None:
    """Has an aggregator make ready, compile perhaps, all that `apply_updates_` will need.

    Args:
        aggregator: fresh.
        infos: the parameters it works for.
        states: of each.
        rules: of `rules_of`.
    """
    # Gradients, which may be missing yet, are like the parameters.
    for job in _jobs(infos, states, rules, lambda info, _: info.values):
        aggregator.prepare(job.function, job.operands, job.options)
        if job.options.get("is_first"):
            later = job.options | {"is_first": False}
            aggregator.prepare(job.function, job.operands, later)


def squared_norm(bucket: Bucket, mean: Compressed, absent: frozenset[int]) -> float:
    """The sum of squares of Δ', over all parameters but `absent` ones.

    Args:
        bucket: after `commit_`.
        mean: C(Δ).
        absent: indices of parameters that are not updated.
    """
    squares = mean.squared_norms(bucket.compressed.difference(absent))
    for entry in bucket.layout.vectors:
        if entry.index not in absent:
            values = bucket.deltas.views[entry.index]
            squares.append(torch.linalg.vector_norm(values, dtype=torch.float64).square())
    return float(torch.stack(squares).sum()) if squares else 0.0


def _target(info: ParameterInfo, rule: Rule) -> Tensor:
    """What `rule` writes to, besides momenta."""
    parameter, gradient = info.parameter, info.parameter.grad
    if not rule.writes_gradients:
        return info.values
    # What Δ' cannot be written into: memory that is shared, or views that are computed when read.
    is_lazy = gradient is not None and (gradient.is_conj() or gradient.is_neg())
    if gradient is None or gradient.layout != torch.strided or 0 in gradient.stride() or is_lazy:
        gradient = parameter.grad = torch.empty_like(parameter, requires_grad=False)
    return real_view(gradient)
