"""One step over all tensors of an optimizer, as one exchange.

It makes the sections when the parameter groups have changed, lets the workers compare what they
train, runs Algorithm 2 on each section, and applies the step only once every section of every
worker is known to be good.
"""

from collections.abc import Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from efsgd.agreement import broadcast_values, check_schema, check_values
from efsgd.arguments import SHARED, validate_own_settings, validate_shared
from efsgd.collectives import Exchange, intercept
from efsgd.compressors import Compressor
from efsgd.control import Verdict, describe_rejection
from efsgd.error_feedback import Outcome, Section, exchange_gradients
from efsgd.errors import CollectiveError, NonFiniteGradientError
from efsgd.phases import Phases
from efsgd.sections import describe, make_sections, signature
from efsgd.state import (
    Member,
    State,
    adopt_replaced_,
    complete_,
    complete_momentum_,
    members,
    show_errors_,
    withdraw_,
)
from efsgd.statistics import Ledger
from efsgd.update import Rule, apply_updates_, prepare_updates, rules_of

__all__ = ["LossScaling", "Stepper"]


@dataclass(frozen=True)
class LossScaling:
    """What torch.amp.GradScaler tells an optimizer about the gradients of a step.

    Attributes:
        factor: the gradients are multiplied by this to be those of the loss.
        has_overflowed: one of this worker's is not finite. A step for which this is so anywhere
            is skipped by all workers, whatever `nonfinite` says: it is the scaler's daily business.
    """

    factor: float
    has_overflowed: bool

    @classmethod
    def of(cls, optimizer: object) -> Self | None:
        """What the scaler has left on `optimizer` for the step that it asks for, if it does."""
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            return None
        scale = getattr(optimizer, "grad_scale", None)  # None: unscaled already
        return cls(1.0 if scale is None else 1.0 / float(scale), bool(found_inf))


class Stepper:
    """Steps an optimizer, and keeps what is derived from its groups between steps.

    Attributes:
        sections: of the present parameter groups; empty before the first step.
        ledger: what was handed to collectives.
        phases: of a step, and how long they take.

    Args:
        compressor: decides what is compressed and how far.
        settings: names of the group entries that workers must agree on.
    """

    def __init__(self, compressor: Compressor, settings: Iterable[str]) -> None:
        self.sections: list[Section] = []
        self.ledger, self.phases = Ledger(), Phases()
        self._compressor, self._settings = compressor, tuple(settings)
        self._members: list[Member] = []
        self._states: dict[int, State] = {}
        self._signature: Hashable = None
        self._prepared: list[Hashable] = []
        self._agreed_on: Hashable = None
        self._compared: Hashable = None

    def forget(self) -> None:
        """Has sections made anew, and workers compare all they have, at the next step."""
        self.sections, self._signature = [], None
        self._agreed_on = self._compared = None

    @torch.no_grad()
    def exchange(
        self,
        groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, State],
        world_size: int,
        worker: int,
        scaling: LossScaling | None = None,
    ) -> Exchange[None]:
        """One step.

        Args:
            groups: parameter groups (parameters, and the count of steps, modified in place).
            state: of the parameters (modified in place).
            world_size: the number of workers.
            worker: this worker's place among them, from 0.
            scaling: of the gradients, in mixed precision.

        Raises:
            NonFiniteGradientError: a worker's gradient is not finite, and the policy is "raise".
            WorkerMismatchError: the workers do not train the same thing.
            CollectiveError: another worker could not take part.
        """
        for group in groups:  # users and schedulers may have changed them
            validate_own_settings(group)
            self._compressor.validate(group)
        validate_shared(groups, (*SHARED, *self._compressor.shared_settings()))
        step, rules = groups[0]["step"], rules_of(groups)
        self._prepare(groups, state, world_size, worker, rules)
        self.ledger.begin_check()
        if world_size > 1:
            yield from intercept(self._check(world_size), outgoing=self.ledger.record)
        parameters = [p for section in self.sections for p in section.parameters.values()]
        self.ledger.begin_step(sum(p.numel() * p.element_size() for p in parameters))
        self.phases.begin_step()
        factor, has_overflowed = 1.0, False
        if scaling is not None:
            factor, has_overflowed = scaling.factor, scaling.has_overflowed
        outcomes: list[Outcome] = []
        for section in self.sections:
            exchange = exchange_gradients(section, step, factor, has_overflowed=has_overflowed)
            outcomes.append((yield from intercept(exchange, outgoing=self.ledger.record)))
        _raise_obstacles(outcomes)
        verdicts = [outcome.verdict for outcome in outcomes]
        if not all(verdict.is_good for verdict in verdicts):
            if groups[0]["nonfinite"] == "raise" and scaling is None:
                names = {member.index: member.name for member in self._members}
                raise NonFiniteGradientError(describe_rejection(verdicts, names, step))
            self.ledger.skip_step()
            return
        self._apply(outcomes, rules)
        for group in groups:
            group["step"] = step + 1
        self.ledger.end_step()

    @torch.no_grad()
    def broadcast(self, groups: list[dict[str, Any]], source: int) -> Exchange[None]:
        """Gives all workers the parameters of one, once it is known that they have the same list.

        Args:
            groups: parameter groups (parameters modified in place).
            source: the worker whose parameters are taken.

        Raises:
            WorkerMismatchError: the workers do not have the same parameters.
        """
        listed = list(members(groups))
        lines = describe(listed, self._compressor, self._settings)
        yield from check_schema(lines, listed[0].parameter.device)
        yield from broadcast_values([member.parameter for member in listed], source)

    def _apply(self, outcomes: Sequence[Outcome], rules: Mapping[int, Rule]) -> None:
        for section, outcome in zip(self.sections, outcomes, strict=True):
            present = section.parameters.keys() - outcome.verdict.absent
            section.commit_(outcome.verdict.absent)
            show_errors_(section, self._states)
            members = [member for member in self._members if member.index in present]
            with self.phases("Alg. 2, lines 11 to 13: update"):
                apply_updates_(section, outcome.mean, members, self._states, rules)

    def _prepare(
        self,
        groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, State],
        world_size: int,
        worker: int,
        rules: Mapping[int, Rule],
    ) -> None:
        kinds = [rule.kind for rule in rules.values()]
        present = signature(groups, state, self._compressor, world_size, worker)
        if present == self._signature:
            for member in self._members:
                if member.index in self._states:
                    complete_momentum_(self._states[member.index], member)
            for section in self.sections:
                adopt_replaced_(section, self._states)
                if kinds != self._prepared:
                    own = [m for m in self._members if m.index in section.parameters]
                    prepare_updates(section.aggregator, own, self._states, rules)
            self._prepared = kinds
            return
        self.sections, self._signature = [], None  # their scratch memory is free for what follows
        self._members, self._states = list(members(groups)), {}
        for member in self._members:
            if member.parameter.requires_grad:
                complete_(state[member.parameter], member, self._compressor)
                self._states[member.index] = state[member.parameter]
            elif member.parameter in state:
                withdraw_(state[member.parameter])
        self.sections = make_sections(
            self._members,
            self._states,
            self._compressor,
            world_size,
            worker,
            self.phases,
            lambda aggregator, own: prepare_updates(aggregator, own, self._states, rules),
        )
        self._signature = signature(groups, state, self._compressor, world_size, worker)
        self._prepared = kinds

    def _check(self, world_size: int) -> Exchange[None]:
        """Compares the workers' parameter lists when they are new, and their values once."""
        roundings = tuple(section.aggregator.rounding for section in self.sections)
        if self._agreed_on == (self._signature, roundings):
            return
        device = self._members[0].parameter.device
        lines = describe(self._members, self._compressor, self._settings, self.sections)
        yield from check_schema(lines, device)
        identities = world_size, tuple(id(member.parameter) for member in self._members)
        if identities != self._compared:
            named = {member.name: member.parameter for member in self._members}
            for member in self._members:
                for key, value in self._states.get(member.index, {}).items():
                    if key != "error":
                        named[f"{key} of {member.name}"] = value
            gradients = [member.parameter.grad for member in self._members]
            yield from check_values(named, gradients, device)
            self._compared = identities
        self._agreed_on = self._signature, roundings


def _raise_obstacles(outcomes: Iterable[Outcome]) -> None:
    """Raises this worker's own error, or says that another worker had one."""
    verdicts: list[Verdict] = []
    for outcome in outcomes:
        if outcome.obstacle is not None:
            raise outcome.obstacle
        verdicts.append(outcome.verdict)
    unable = sorted({worker for verdict in verdicts for worker in verdict.unable})
    if unable:
        numbers = ", ".join(map(str, unable))
        raise CollectiveError(f"could not take part, and say themselves why: worker {numbers}.")
