"""The sections of an optimizer's parameter groups, kept while the groups stay what they are."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from efsgd.algorithms.bucket import Section
from efsgd.algorithms.interfaces import Compressor
from efsgd.engine.buckets import make_sections, memory_of, signature
from efsgd.engine.parameters import Member, members
from efsgd.engine.state import State, adopt_replaced_, complete_, complete_momentum_, withdraw_
from efsgd.engine.update import Rules, prepare_updates
from efsgd.profiling import Phases
from efsgd.wire.control_words import Verdict

__all__ = ["Groups", "Plan", "Signature"]

#: Parameter groups of an optimizer.
Groups: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True)
class Signature:
    """What a plan depends on: while it stays equal, the plan can be used again.

    Attributes:
        settings: what users change.
        phase: what changes by itself, on all workers before the same step.
    """

    settings: Hashable
    phase: Hashable


class Plan:
    """What is derived from parameter groups, and made anew when they change.

    Attributes:
        members: the parameters, in order.
        states: of those that require a gradient, by index.
        sections: of the same; empty before the first step.
        sparse: the parameters that are known to have sparse gradients.
        context: the number of workers, and which of them this one is.
        signature: of the groups and the state that the sections were made for.

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
        self.signature: Signature | None = None
        self._prepared: list[Hashable] = []
        # Of states that the last `update` changed: what they had under these names.
        self._replaced: list[tuple[State, dict[str, Tensor | None]]] = []

    @property
    def roundings(self) -> tuple[str, ...]:
        """How this worker rounds, in each section; see `efsgd.compressors.Aggregator`."""
        return tuple(section.aggregator.rounding for section in self.sections)

    def forget(self) -> None:
        """Frees the sections; they are made anew by the next `update`."""
        self.sections, self.signature = [], None

    def keep_changes(self) -> None:
        """The step is applied: what `update` has made of the state stays."""
        self._replaced = []

    def undo_changes_(self) -> None:
        """Puts back what `update` has replaced in the state since then (modified in place).

        Those are factors of another rank, and what a tensor needs that was not compressed before.
        """
        for own, before in self._replaced:
            for name, value in before.items():
                if value is None:
                    own.pop(name, None)
                else:
                    own[name] = value
        if self._replaced:
            self.forget()  # its views are those that were left out
        self._replaced = []

    def sign(self, groups: Groups, state: Mapping[Tensor, State]) -> Signature:
        """All that a plan of these groups depends on, as it is now."""
        phase = self.phase(groups[0]["step"], groups[0]["start_compressing_at"])
        return Signature(signature(groups, state, self._compressor), phase)

    def phase(self, step: int, start: int) -> Hashable:
        """What changes by itself, on all workers before the same step.

        Args:
            step: the number of the step, from 0.
            start: the step at which compression starts.
        """
        return step >= start, frozenset(map(id, self.sparse))

    def note_sparse(self, verdicts: Iterable[Verdict]) -> None:
        """From the next step on, what was sparse on any worker is sent uncompressed."""
        indices = {index for verdict in verdicts for index in verdict.sparse}
        self.sparse |= {member.parameter for member in self.members if member.index in indices}

    def describe_roundings(self) -> Iterator[str]:
        """How compressed parameters are rounded, a line for each."""
        names = {member.index: member.name for member in self.members}
        for section in self.sections:
            for index in sorted(section.compressed):
                yield f"{names[index]}, {section.aggregator.rounding}"

    def update(
        self,
        groups: Groups,
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
            RuntimeError: a parameter has no values.
            TypeError: an entry of the state is no tensor.
            ValueError: a tensor in the state has not the shape of its parameter.
        """
        kinds = [rule.kind for rule in rules.values()]
        if context == self.context and self.signature == self.sign(groups, state):
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
        self.members, self.states = list(members(groups, self.sparse)), {}
        memory = memory_of(self.sections, self.members, self._compressor)
        self.forget()  # all other memory is free for what follows
        for member in self.members:
            if member.parameter.is_meta:
                fused = "`fused=True` requires all the params to have values, but "
                raise RuntimeError(
                    f"{fused if member.group.get('fused') else ''}{member.name} is on the meta "
                    f"device: there is nothing that a step could change. Give it values first, for "
                    f"example by module.to_empty(device='cpu')."
                )
            if member.parameter.requires_grad:
                self._complete_(state[member.parameter], member)
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
            memory,
        )
        self.context, self._prepared = context, kinds
        self.sparse &= {member.parameter for member in self.members}
        self.signature = self.sign(groups, state)

    def _complete_(self, own: State, member: Member) -> None:
        before = dict(own)
        try:
            complete_(own, member, self._compressor)
        finally:
            replaced = {
                name: before.get(name)
                for name, value in own.items()
                if name not in before
                or (value is not before[name] and value.shape != before[name].shape)
            }
            if replaced:
                self._replaced.append((own, replaced))
