"""The buckets of an optimizer's parameter groups, kept while the groups stay what they are."""

from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from efsgd.algorithms.bucket import Bucket
from efsgd.engine.buckets import divide, make_bucket, memory_of
from efsgd.engine.parameters import (
    GroupNotes,
    Groups,
    ParameterInfo,
    frozen,
    list_parameters,
    require_writable,
)
from efsgd.engine.state import State, StateViews, complete_, detach_from_buffer_
from efsgd.engine.update import Kind, Method, Rules, kinds_of, prepare_updates
from efsgd.profiling import Phases
from efsgd.wire.collectives import Exchange
from efsgd.wire.control_words import Verdict
from efsgd.wire.together import one_by_one, together
from efsgd.wire.traffic import TrafficCounter

T = TypeVar("T")


@dataclass(frozen=True)
class Signature:
    """What a plan depends on: while it stays equal, the plan can be used again.

    Attributes:
        settings: of the groups, and identities of parameters and state: this worker's own.
        phase: what changes by itself, on all workers before the same step.
    """

    settings: Hashable
    phase: Hashable


class Plan:
    """What is derived from parameter groups, and made anew when they change.

    Attributes:
        infos: the parameters, in order.
        states: of those that are trained, by index.
        views: what these states show of the buckets.
        buckets: of the same parameters; empty before the first step.
        members: for each bucket its parameters, in its order.
        nbytes: the size of all their gradients.
        sparse: the parameters that are known to have sparse gradients.
        context: the number of workers, and which of them this one is.
        signature: of the groups and the state that the buckets were made for; None: make them anew.
        order: places of parameters in the order of the model, by which buckets are filled; None: as
            the groups have them.
        arrivals: waits for the gradients of some parameters, or of all (None), where steps begin
            before they are there: on all workers, or on none.
        prepared_with: what gradients are made with, where a `Preparation` makes them; part of the
            signature.

    Args:
        method: how the optimizer treats its groups.
        notes: what groups say about the optimizer as a whole.
        phases: names the phases of a step.
        traffic: counts what is sent.
    """

    def __init__(
        self, method: Method, notes: GroupNotes, phases: Phases, traffic: TrafficCounter
    ) -> None:
        self._method, self._notes, self._phases, self._traffic = method, notes, phases, traffic
        self.infos: list[ParameterInfo] = []
        self.states: dict[int, State] = {}
        self.views = StateViews([], {}, method)
        self.buckets: list[Bucket] = []
        self.members: dict[Bucket, list[ParameterInfo]] = {}
        self.nbytes = 0
        self.sparse: set[Tensor] = set()
        self.context: tuple[int, int] = (1, 0)
        self.signature: Signature | None = None
        self.order: Mapping[Tensor, int] | None = None
        self.arrivals: Callable[[Sequence[Tensor] | None], None] | None = None
        self.prepared_with: Hashable = None
        names = ("error_feedback", "start_compressing_at", "check_every", "bucket_bytes")
        self._signed = (*method.compressor.settings(), *names)
        self._prepared: list[Hashable] = []
        # For each bucket the kinds of its parameters, and what they hold for.
        self._kinds: dict[Bucket, tuple[Hashable, list[Kind]]] = {}
        # Of states that the last `update` changed: what they had under these names.
        self._replaced: list[tuple[State, dict[str, Tensor | None]]] = []
        # Those that had no state before it, and where it is now.
        self._added: list[tuple[MutableMapping[Tensor, State], Tensor]] = []

    @property
    def numerics(self) -> tuple[str, ...]:
        """How this worker computes, in each bucket; see `efsgd.compressors.Aggregator`."""
        return tuple([bucket.aggregator.numerics for bucket in self.buckets])

    def describe_numerics(self) -> Iterator[str]:
        """How compressed parameters are computed with, a line for each."""
        names = {info.index: info.name for info in self.infos}
        for bucket in self.buckets:
            for index in sorted(bucket.compressed):
                yield f"{names[index]}, {bucket.aggregator.numerics}"

    def reset(self) -> None:
        """Frees the buckets; they are made anew by the next `update`."""
        self.buckets, self.members, self._kinds, self.signature = [], {}, {}, None

    def invalidate(self) -> None:
        """The next `update` makes the buckets anew; until then the others may count on these."""
        self.signature = None

    def sign(self, groups: Groups, state: Mapping[Tensor, State]) -> Signature:
        """All that a plan of these groups depends on, as it is now."""
        signed: list[Hashable] = [self.prepared_with]
        for group in groups:
            signed.append(id(group))
            for name in self._signed:
                signed.append(group[name])
            signed += [frozen(group), group.get("momentum", 0) != 0]
            signed += [
                (id(p), id(state.get(p)), p.dtype, p.device, p.shape)
                if p.requires_grad and not is_lazy(p)
                else id(p)
                for p in group["params"]
            ]
        start = self._notes.shared(groups)["start_compressing_at"]
        phase = self.phase(self._notes.step, start)
        return Signature(tuple(signed), phase)

    def phase(self, step: int, start: int) -> Hashable:
        """What changes by itself, on all workers before the same step."""
        return step >= start, frozenset(map(id, self.sparse))

    def note_sparse(self, verdicts: Iterable[Verdict]) -> None:
        """From the next step on, what was sparse on any worker is sent uncompressed."""
        for verdict in verdicts:
            if verdict.sparse:
                self.sparse |= {i.parameter for i in self.infos if i.index in verdict.sparse}

    def find_sparse(self, groups: Groups) -> None:
        """What has a sparse gradient on this worker, the only one, is sent uncompressed."""
        for group in groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is not None and gradient.layout != torch.strided:
                    self.sparse.add(parameter)

    def exchange_all(self, exchanges: Sequence[Exchange[T]]) -> Exchange[list[T]]:
        """Takes part in an exchange for each bucket, in an order that all workers have."""
        return together(exchanges) if self.arrivals is None else one_by_one(exchanges)

    def await_gradients(self, bucket: Bucket | None = None) -> None:
        """Waits until the gradients of a bucket are there, or all of them."""
        if self.arrivals is not None:
            own = () if bucket is None else self.members[bucket]
            self.arrivals(None if bucket is None else [info.parameter for info in own])

    def gradients(self, bucket: Bucket) -> dict[int, Tensor | None]:
        """This worker's gradients g_w, for the tensors of a bucket in its order."""
        return {info.index: info.gradient for info in self.members[bucket]}

    def update(
        self,
        groups: Groups,
        state: MutableMapping[Tensor, State],
        context: tuple[int, int],
        signature: Signature,
    ) -> None:
        """Makes the buckets, where they are not those of these groups already.

        Raises:
            RuntimeError: a parameter has no values, or cannot be written to.
            TypeError: an entry of the state is no tensor.
            ValueError: a tensor in the state has not the shape of its parameter.
        """
        if context == self.context and signature == self.signature:
            self.views.adopt_replaced_()
            return
        compressor, before = self._method.compressor, self.infos
        self.infos, self.states = list(list_parameters(groups, self.sparse)), {}
        divided = divide(self.infos, self._notes.shared(groups)["bucket_bytes"], self.order)
        memory = memory_of(self.buckets, before, divided, compressor)
        self.reset()  # all other memory is free for what follows
        for info in self.infos:
            if info.is_trained:
                _require_values(info)
                require_writable(info)
                self._complete_(state, info)
                self.states[info.index] = state[info.parameter]
        trained = {info.parameter for info in self.infos if info.is_trained}
        for info in (*before, *self.infos):
            if info.parameter not in trained and info.parameter in state:
                detach_from_buffer_(state[info.parameter])
        shown = [info for infos in divided for info in infos]
        self.views = StateViews(shown, self.states, self._method)
        self.views.release_zeros_(buffer for pair in memory if pair for buffer in pair)
        for infos, own in zip(divided, memory, strict=True):
            bucket = make_bucket(infos, compressor, context, self._phases, self._traffic, own)
            self.views.attach_(bucket)
            self.buckets.append(bucket)
            self.members[bucket] = infos
        self.context, self._prepared = context, []
        self.nbytes = sum(p.numel() * p.element_size() for p in trained)
        self.sparse &= {info.parameter for info in self.infos}
        self.signature = self.sign(groups, state)

    def prepare(self, rules: Rules) -> None:
        """Has the buckets compile what these rules need, where they compile anything."""
        if self.numerics == ("eager",) * len(self.buckets):
            return
        kinds = [rule.kind for rule in rules.values()]
        if kinds != self._prepared:
            for bucket in self.buckets:
                prepare_updates(bucket, self.members[bucket], self.states, rules)
        self._prepared = kinds

    def kinds(self, bucket: Bucket, absent: frozenset[int], rules: Rules) -> list[Kind]:
        """The parameters of a bucket but `absent` ones, by what rules do with them."""
        since = self.views.steady_since
        rest = tuple((g, rule.keeps_momentum, rule.writes_gradients) for g, rule in rules.items())
        if not absent and since is not None and bucket in self._kinds:
            known_for, kinds = self._kinds[bucket]
            if known_for == (since, rest):
                return kinds
        own = [info for info in self.members[bucket] if info.index not in absent]
        kinds = kinds_of(own, self.states, rules)
        if not absent and since is not None:
            self._kinds[bucket] = (since, rest), kinds
        return kinds

    def keep_changes(self) -> None:
        """The step is applied: what `update` has made of the state stays."""
        self._replaced, self._added = [], []

    def undo_changes_(self) -> None:
        """Puts back what `update` has replaced in the state since then (modified in place).

        Those are factors of another rank, and what a tensor needs that was not compressed before.
        """
        for state, parameter in self._added:
            del state[parameter]
        for own, before in self._replaced:
            for name, value in before.items():
                if value is None:
                    own.pop(name, None)
                else:
                    own[name] = value
        if self._replaced:
            self.invalidate()  # its views are those that were left out
            self._replaced, self._added = [], []

    def _complete_(self, state: MutableMapping[Tensor, State], info: ParameterInfo) -> None:
        is_new, own = info.parameter not in state, state[info.parameter]
        before = dict(own)
        try:
            complete_(own, info, self._method)
        finally:
            replaced = {
                name: before.get(name)
                for name, value in own.items()
                if name not in before
                or (value is not before[name] and value.shape != before[name].shape)
            }
            if replaced:
                self._replaced.append((own, replaced))
            if is_new:
                self._added.append((state, info.parameter))


def _require_values(info: ParameterInfo) -> None:
    if info.parameter.is_meta:
        fused = "`fused=True` requires all the params to be floating point Tensors of supported "
        fused = f"{fused}devices, but " if info.group.get("fused") else ""  # torch's own words
        raise RuntimeError(
            f"{fused}{info.name} is on the meta "
            f"device: there is nothing that a step could change. Give it values first, for "
            f"example by module.to_empty(device='cpu')."
        )
