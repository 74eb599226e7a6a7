"""How an optimizer treats its groups; and from averaged updates to new parameters."""

from collections.abc import Callable, Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.error_feedback import decompress_with_
from efsgd.algorithms.interfaces import Compressed, Compressor
from efsgd.algorithms.sgd import sgd_
from efsgd.engine.parameters import Groups, ParameterInfo
from efsgd.layout import Elementwise, is_fake, real_view


@dataclass(frozen=True)
class Rule:
    """How a group updates its parameters. Made before anything is sent, so that it can be refused.

    Attributes:
        function: updates parameters and momenta. Its option `together` says whether many tensors
            share a kernel; None: on accelerators.
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
class Method:
    """How an optimizer treats its parameter groups: made once, by the optimizer.

    Attributes:
        compressor: decides what is compressed and how far.
        compared: names of the group entries that workers must agree on.
        validate: checks groups before each step, for users and schedulers change them.
        rules: how groups are updated. Raises where that cannot be done.
        keeps_momentum: whether the state has momentum buffers, for the rules.
        takes_sparse: whether gradients may be sparse.
    """

    compressor: Compressor
    compared: tuple[str, ...]
    validate: Callable[[Groups], None]
    rules: Callable[[Groups], Rules]
    keeps_momentum: bool
    takes_sparse: bool


@dataclass(frozen=True)
class LossScaling:
    """What torch.amp.GradScaler tells an optimizer about the gradients of a step.

    Attributes:
        factor: the gradients are multiplied by this to be those of the loss.
        has_overflowed: one of this worker's is not finite. A step for which this is so anywhere
            is skipped by all workers, whatever `nonfinite` says: the scaler expects that.
    """

    factor: float
    has_overflowed: bool = False

    @classmethod
    def of(cls, optimizer: object, known: float | None = None) -> Self | None:
        """What the scaler has left on `optimizer` for the step that it asks for, if it does.

        Otherwise there is scaling where a scale is `known`.
        """
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            return None if known is None else cls(1.0 / known)
        scale = getattr(optimizer, "grad_scale", None)  # None: unscaled already
        return cls(1.0 if scale is None else 1.0 / float(scale), bool(found_inf))


@dataclass(frozen=True)
class Kind:
    """Parameters of one group that are updated in the same way.

    `targets` are what is written to besides momenta, by index; None: to be found in each step.
    """

    group: int
    is_first: bool
    infos: Sequence[ParameterInfo]
    targets: Mapping[int, Tensor] | None
    momenta: Mapping[int, Tensor]


@dataclass(frozen=True)
class _Job:
    """What is updated, with momenta, and how."""

    operands: Sequence[Mapping[int, Tensor]]
    started: Sequence[Tensor]
    function: Elementwise
    options: dict[str, Any]


_State: TypeAlias = Mapping[int, MutableMapping[str, Tensor]]


def kinds_of(infos: Iterable[ParameterInfo], states: _State, rules: Rules) -> list[Kind]:
    """Parameters, by what is done with them."""
    grouped: dict[tuple[int, bool, bool], list[ParameterInfo]] = {}
    for info in infos:
        state = states[info.index]
        has_momentum = "momentum_buffer" in state and rules[id(info.group)].keeps_momentum
        is_first = has_momentum and not state["momentum_started"]
        grouped.setdefault((id(info.group), has_momentum, is_first), []).append(info)
    kinds = []
    for (group, has_momentum, is_first), own in grouped.items():
        momenta = {
            info.index: real_view(states[info.index]["momentum_buffer"])
            for info in (own if has_momentum else ())
        }
        # Gradients are others in each step, and a complex parameter's real view may be.
        is_fixed = not rules[group].writes_gradients
        is_fixed = is_fixed and not any(info.parameter.is_complex() for info in own)
        targets = {info.index: info.values for info in own} if is_fixed else None
        kinds.append(Kind(group, is_first, own, targets, momenta))
    return kinds


def _jobs(
    bucket: Bucket,
    kinds: Sequence[Kind],
    states: _State,
    rules: Rules,
    target: Callable[[ParameterInfo, Rule], Tensor],
) -> list[_Job]:
    jobs, begun = [], {kind.group for kind in kinds if kind.momenta and not kind.is_first}
    for kind in kinds:
        rule, targets = rules[kind.group], kind.targets
        if targets is None:
            targets = {info.index: target(info, rule) for info in kind.infos}
        options = dict(rule.options)
        if "together" in options and options["together"] is None:
            options["together"] = bucket.aggregator.placement.saves_launches or None
        if rule.function is sgd_:
            options["is_first"] = kind.is_first
            # Where only some momenta are begun, torch takes them one by one; bfloat16 shows it.
            is_mixed = kind.group in begun and any(
                other.group == kind.group and other.is_first for other in kinds
            )
            if kind.momenta and is_mixed:
                options["together"] = bool(options["together"] and options["fused"])
        flags = [states[i.index]["momentum_started"] for i in kind.infos] if kind.is_first else []
        operands = [targets, kind.momenta] if kind.momenta else [targets]
        jobs.append(_Job(operands, flags, rule.function, options))
    return jobs


def apply_updates_(
    bucket: Bucket,
    mean: Compressed,
    kinds: Sequence[Kind],
    states: _State,
    rules: Rules,
    **changes: float,
) -> None:
    """Updates momenta and parameters, after `Bucket.commit_`; `changes` replace rules' options."""
    numbers = {name: float(value) for name, value in changes.items()}  # a scalar tensor, perhaps
    for job in _jobs(bucket, kinds, states, rules, _target):
        decompress_with_(bucket, mean, job.function, *job.operands, **job.options | numbers)
        for flag in job.started:
            flag.fill_(True)


def prepare_updates(
    bucket: Bucket, infos: Iterable[ParameterInfo], states: _State, rules: Rules
) -> None:
    """Has an aggregator compile, if it does so, all that `apply_updates_` will need."""
    # Gradients, which may be missing yet, are like the parameters.
    kinds = kinds_of(infos, states, rules)
    for job in _jobs(bucket, kinds, states, rules, lambda info, _: info.values):
        bucket.aggregator.prepare(job.function, job.operands, job.options)
        if job.options.get("is_first"):
            later = job.options | {"is_first": False}
            bucket.aggregator.prepare(job.function, job.operands, later)


def squared_norm(bucket: Bucket, mean: Compressed, absent: frozenset[int]) -> float:
    """The sum of squares of Δ', over all parameters but `absent` ones, after `commit_`."""
    squares = mean.squared_norms(bucket.compressed.difference(absent))
    for entry in bucket.layout.vectors:
        if entry.index not in absent:
            values = bucket.deltas.views[entry.index]
            squares.append(torch.linalg.vector_norm(values, dtype=torch.float64).square())
    total = torch.stack(squares).sum() if squares else None
    return 0.0 if total is None or is_fake(total) else float(total)


def _target(info: ParameterInfo, rule: Rule) -> Tensor:
    """What `rule` writes to, besides momenta."""
    if not rule.writes_gradients:
        return info.values
    gradient = info.gradient
    # What Δ' cannot be written into: memory that is shared, views that are computed when read, and
    # what was made in inference mode.
    is_odd = gradient is not None and (
        gradient.is_conj() or gradient.is_neg() or gradient.is_inference()
    )
    if gradient is None or gradient.layout != torch.strided or 0 in gradient.stride() or is_odd:
        gradient = info.parameter.grad = torch.empty_like(info.parameter, requires_grad=False)
    return real_view(gradient)
