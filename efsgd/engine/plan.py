"""The buckets of an optimizer's parameter groups, kept while the groups stay what they are."""

from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.interfaces import Compressor
from efsgd.engine.buckets import make_buckets, memory_of, signature
from efsgd.engine.parameters import ParameterInfo, list_parameters
from efsgd.engine.state import (
    State,
    adopt_replaced_,
    complete_,
    complete_momentum_,
    detach_from_buffer_,
)
from efsgd.engine.update import Rules, prepare_updates
from efsgd.profiling import Phases
from efsgd.wire.control_words import Verdict

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
        infos: the parameters, in order.
        states: of those that require a gradient, by index.
        buckets: of the same; empty before the first step.
        sparse: the parameters that are known to have sparse gradients.
        context: the number of workers, and which of them this one is.
        signature: of the groups and the state that the buckets were made for.

    Args:
        compressor: decides what is compressed and how far.
        phases: names the phases of a step.
    """

    def __init__(self, compressor: Compressor, phases: Phases) -> None:
        self.infos: list[ParameterInfo] = []
        self.states: dict[int, State] = {}
        self.buckets: list[Bucket] = []
        self.sparse: set[Tensor] = set()
        self.context: tuple[int, int] = (1, 0)
        self._compressor, self._phases = compressor, phases
        self.signature: Signature | None = None
        self._prepared: list[Hashable] = []
        # Of states that the last `update` changed: what they had under these names.
        self._replaced: list[tuple[State, dict[str, Tensor | None]]] = []

    @property
    def numerics(self) -> tuple[str, ...]:
        """How this worker rounds, in each bucket; see `efsgd.compressors.Aggregator`."""
        return tuple(bucket.aggregator.numerics for bucket in self.buckets)

    def reset(self) -> None:
        """Frees the buckets; they are made anew by the next `update`."""
        self.buckets, self.signature = [], None

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
            self.reset()  # its views are those that were left out
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
        self.sparse |= {info.parameter for info in self.infos if info.index in indices}

    def describe_numerics(self) -> Iterator[str]:
        """How compressed parameters are rounded, a line for each."""
        names = {info.index: info.name for info in self.infos}
        for bucket in self.buckets:
            for index in sorted(bucket.compressed):
                yield f"{names[index]}, {bucket.aggregator.numerics}"

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
            state: of the parameters (modified in place: completed, and made views of buckets).
            context: the number of workers, and this worker.
            rules: by which the groups will be updated.

        Raises:
            RuntimeError: a parameter has no values.
            TypeError: an entry of the state is no tensor.
            ValueError: a tensor in the state has not the shape of its parameter.
        """
        kinds = [rule.kind for rule in rules.values()]
        if context == self.context and self.signature == self.sign(groups, state):
            for info in self.infos:
                if info.index in self.states:
                    complete_momentum_(self.states[info.index], info)
            for bucket in self.buckets:
                adopt_replaced_(bucket, self.states)
                if kinds != self._prepared:
                    own = [m for m in self.infos if m.index in bucket.parameters]
                    prepare_updates(bucket.aggregator, own, self.states, rules)
            self._prepared = kinds
            return
        self.infos, self.states = list(list_parameters(groups, self.sparse)), {}
        memory = memory_of(self.buckets, self.infos, self._compressor)
        self.reset()  # all other memory is free for what follows
        for info in self.infos:
            if info.parameter.is_meta:
                fused = "`fused=True` requires all the params to have values, but "
                raise RuntimeError(
                    f"{fused if info.group.get('fused') else ''}{info.name} is on the meta "
                    f"device: there is nothing that a step could change. Give it values first, for "
                    f"example by module.to_empty(device='cpu')."
                )
            if info.parameter.requires_grad:
                self._complete_(state[info.parameter], info)
                self.states[info.index] = state[info.parameter]
            elif info.parameter in state:
                detach_from_buffer_(state[info.parameter])
        self.buckets = make_buckets(
            self.infos,
            self.states,
            self._compressor,
            *context,
            self._phases,
            lambda aggregator, own: prepare_updates(aggregator, own, self.states, rules),
            memory,
        )
        self.context, self._prepared = context, kinds
        self.sparse &= {info.parameter for info in self.infos}
        self.signature = self.sign(groups, state)

    def _complete_(self, own: State, info: ParameterInfo) -> None:
        before = dict(own)
        try:
            complete_(own, info, self._compressor)
        finally:
            replaced = {
                name: before.get(name)
                for name, value in own.items()
                if name not in before
                or (value is not before[name] and value.shape != before[name].shape)
            }
            if replaced:
                self._replaced.append((own, replaced))
