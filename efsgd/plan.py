"""The sections of an optimizer's parameter groups, kept while the groups stay what they are."""

from collections.abc import Hashable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from efsgd.compressors import Compressor
from efsgd.error_feedback import Section
from efsgd.phases import Phases
from efsgd.rules import Rules
from efsgd.sections import make_sections, signature
from efsgd.state import (
    Member,
    State,
    adopt_replaced_,
    complete_,
    complete_momentum_,
    members,
    withdraw_,
)
from efsgd.update import prepare_updates

__all__ = ["Plan"]


class Plan:
    """What is derived from parameter groups, and made anew when they change.

    Attributes:
        members: the parameters, in order.
        states: of those that require a gradient, by index.
        sections: of the same; empty before the first step.
        sparse: the parameters that are known to have sparse gradients.
        context: the number of workers, and which of them this one is.

    Args:
        compressor: decides what is compressed and how far.
        phases: names the phases of a step.
    """

    def __init__(self, compressor: Compressor, phases: Phases) -> None:
        self.members: list[Member] = []
        self.states: dict[int, State] = {}
        self.sections: list[Section] = []
        self.sparse: set[Tensor] = set()
        self.context: tuple[int, int] = (1, 0)
        self._compressor, self._phases = compressor, phases
        self._signature: Hashable = None
        self._phase: Hashable = None
        self._prepared: list[Hashable] = []

    @property
    def identity(self) -> Hashable:
        """Equal for equal plans, with the same rounding."""
        roundings = tuple(section.aggregator.rounding for section in self.sections)
        return self._signature, self._phase, roundings

    def forget(self) -> None:
        """Frees the sections; they are made anew by the next `update`."""
        self.sections, self._signature, self._phase = [], None, None

    def has_changed(
        self, groups: list[dict[str, Any]], state: MutableMapping[Tensor, State]
    ) -> bool:
        """Whether anyone has changed the groups or the state since the last `update`."""
        return self._signature != signature(groups, state, self._compressor)

    def is_current(
        self, groups: list[dict[str, Any]], state: MutableMapping[Tensor, State]
    ) -> bool:
        """Whether the sections can be used again: nothing has changed, and no time has come."""
        return not self.has_changed(groups, state) and self._phase == self._phase_of(groups)

    def update(
        self,
        groups: list[dict[str, Any]],
        state: MutableMapping[Tensor, State],
        context: tuple[int, int],
        rules: Rules,
    ) -> None:
        """Makes all ready for a step with these groups.

        Args:
            groups: parameter groups.
            state: of the parameters (modified in place: completed, and made views of sections).
            context: the number of workers, and this worker.
            rules: by which the groups will be updated.

        Raises:
            ValueError: a tensor in the state has not the shape of its parameter.
        """
        kinds = [rule.kind for rule in rules.values()]
        if context == self.context and self.is_current(groups, state):
            for member in self.members:
                if member.index in self.states:
                    complete_momentum_(self.states[member.index], member)
            for section in self.sections:
                adopt_replaced_(section, self.states)
                if kinds != self._prepared:
                    own = [m for m in self.members if m.index in section.parameters]
                    prepare_updates(section.aggregator, own, self.states, rules)
            self._prepared = kinds
            return
        self.forget()  # its scratch memory is free for what follows
        self.members, self.states = list(members(groups, self.sparse)), {}
        for member in self.members:
            if member.parameter.is_meta:
                fused = "`fused=True` requires all the params to have values, but "
                raise RuntimeError(
                    f"{fused if member.group.get('fused') else ''}{member.name} is on the meta "
                    f"device: there is nothing that a step could change. Give it values first, for "
                    f"example by module.to_empty(device='cpu')."
                )
            if member.parameter.requires_grad:
                complete_(state[member.parameter], member, self._compressor)
                self.states[member.index] = state[member.parameter]
            elif member.parameter in state:
                withdraw_(state[member.parameter])
        self.sections = make_sections(
            self.members,
            self.states,
            self._compressor,
            *context,
            self._phases,
            lambda aggregator, own: prepare_updates(aggregator, own, self.states, rules),
        )
        self.context, self._prepared = context, kinds
        self._signature = signature(groups, state, self._compressor)
        self._phase = self._phase_of(groups)

    def replicated(self) -> dict[str, Tensor]:
        """What must be equal on all workers, by name: parameters and state but for errors."""
        named = {member.name: member.parameter.detach() for member in self.members}
        for member in self.members:
            for key, value in sorted(self.states.get(member.index, {}).items()):
                if key != "error" and isinstance(value, torch.Tensor):
                    named[f"{key} of {member.name}"] = value
        return named

    def _phase_of(self, groups: list[dict[str, Any]]) -> Hashable:
        """What changes by itself, on all workers before the same step."""
        is_compressing = groups[0]["step"] >= groups[0]["start_compressing_at"]
        return is_compressing, frozenset(map(id, self.sparse))
