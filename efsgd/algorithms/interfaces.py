"""What Algorithm 2 asks of a compressor. It names none."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from efsgd.algorithms.reading import Reading, Transcript
from efsgd.checks import plain
from efsgd.layout import Blocks, Elementwise, Entry, Layout
from efsgd.profiling import Phases
from efsgd.wire.collectives import Exchange

#: The entries of a parameter group, of which a compressor reads its own.
Settings: TypeAlias = Mapping[str, Any]
Gradients: TypeAlias = Mapping[int, Tensor | None]


class Compressed(ABC):
    """A compressed form of the matrices of a layout, not yet multiplied out.

    Attributes:
        is_finite: of a mean, False where it is known that decompressed numbers are not; the same
            on every worker. The floats that collectives carry are looked at elsewhere.
    """

    is_finite: bool = True

    @abstractmethod
    def decompress_with_(
        self, function: Elementwise, *operands: Mapping[int, Tensor], **options: Any
    ) -> None:
        """Decompresses and hands over a few chunks at a time, so that nothing is kept whole.

        Args:
            function: is given the chunks. What it does to one element must not depend on others.
            operands: tensors by parameter index, all with the same indices, in the parameters'
                shapes (`function` may modify them). Matrices without an index in them are left
                out; indices that are no matrices of the layout are ignored.
            options: passed on to `function`: numbers, and flags.
        """

    def subtract_from_(self, blocks: Blocks) -> None:
        """Subtracts the decompressed matrices from `blocks` (modified in place)."""
        self.decompress_with_(subtract_, blocks.views)

    @abstractmethod
    def squared_norms(self, wanted: Container[int]) -> list[Tensor]:
        """Sums of squares, [] float64, of the decompressed matrices of parameters by index.

        They add up to that of all of these; a stack of matrices may have several.
        """


def copy_(values: Sequence[Tensor], targets: Sequence[Tensor], *, clip: Any = None) -> None:
    """Copies each of `values`, multiplied by `clip`, to its target (both modified in place)."""
    for value, target in zip(values, targets, strict=True):
        target.copy_(value if clip is None else value.mul_(clip))


def subtract_(values: Sequence[Tensor], minuends: Sequence[Tensor]) -> None:
    """Subtracts each of `values` from its minuend (modified in place)."""
    for value, minuend in zip(values, minuends, strict=True):
        minuend.sub_(value)


@dataclass(frozen=True)
class Placement:
    """Where an aggregator works.

    Attributes:
        dtype: of deltas and buffers: float32, or float64 for parameters of that precision.
        device: of deltas and buffers.
        worker, world_size: this worker, and the number of all.
    """

    dtype: torch.dtype
    device: torch.device
    worker: int = 0
    world_size: int = 1

    @property
    def saves_launches(self) -> bool:
        """Whether few operations are worth some padding: on accelerators, where starts are slow."""
        return self.device.type != "cpu"


class Aggregator(ABC):
    """Algorithm 2, lines 8 and 10, for the tensors of one layout.

    Laws: all workers obtain the bitwise same mean; the collectives that are asked for depend on
    the layout and the kind of the step alone (see `Compressor.step_kind`); what is kept from step
    to step changes in `commit_` and nowhere else.

    Attributes:
        layout: which tensor lies where, and how far it is compressed.
        placement: dtype and device, worker and number of workers.
        vectors: flat buffer [layout.vector_floats] of this worker's values when `compress` is
            called, of their mean once `aggregate` has returned. The first collective's buffer
            begins with it or a copy, and is answered before any other.
        phases: names the phases of a step; set by the bucket that the aggregator works for.
        groups: by index each tensor's parameter group as it is now; set by who makes the bucket.
        abstains: whether this worker cannot take part: it compresses zeros, and sends zeros.
        shows_nonfinite: whether its first buffer is not finite wherever a delta is not. Otherwise
            deltas are looked through first, in a pass, and zeros sent where they are not finite.
    """

    vectors: Tensor
    shows_nonfinite: bool = False
    added_ahead: frozenset[int] = frozenset()  # by `add_ahead_`: their indices

    def __init__(self, layout: Layout, placement: Placement) -> None:
        self.layout, self.placement, self.phases = layout, placement, Phases()
        self.groups: Mapping[int, Mapping[str, Any]] = {}
        self.abstains = False

    @property
    def numerics(self) -> str:
        """How this worker rounds, in a word; it may change in `prepare` alone.

        Workers with different words refuse to train together.
        """
        return "eager"

    def prepare(
        self,
        function: Elementwise,
        operands: Sequence[Mapping[int, Tensor]],
        options: Mapping[str, Any],
    ) -> None:
        """Before a step: makes ready what `decompress_with_` will be asked for; changes nothing."""

    def add_ahead_(
        self, deltas: Blocks, errors: Blocks | None, gradients: Gradients, scale: float, step: int
    ) -> None:
        """Line 7 for tensors `added_ahead`, in one pass with what `compress` begins with."""

    @abstractmethod
    def compress(self, deltas: Blocks, step: int) -> Exchange[Compressed]:
        """Line 8: this worker's own compressed form of `deltas`, which is not modified."""

    @abstractmethod
    def aggregate(self, local: Any) -> Exchange[Compressed]:
        """Line 10: the mean over the workers of what `compress` returned."""

    def commit_(self, absent: frozenset[int]) -> None:
        """The step holds: keep what the next one starts from, except for `absent` parameters."""

    def state(self) -> dict[int, dict[str, Tensor]]:
        """What is kept from step to step, by parameter index and name: live views."""
        return {entry.index: {} for batch in self.layout.batches for entry in batch.entries}

    def public(self) -> Sequence[Tensor]:
        """What all workers know before a step, and its messages are read with: live tensors."""
        return ()

    def read(self, said: Transcript) -> Mapping[int, Reading]:
        """What a message says of each compressed parameter, by index; for `efsgd.audit` alone.

        The answers may stand in for what was sent, if all are means: what they say is then read.
        Where a step has failed, buffers at the end are missing.
        """
        remedy = "Define read(self, said): see efsgd.algorithms.interfaces.Aggregator."
        name = type(self).__name__
        raise NotImplementedError(f"{name} does not say how its messages are read. {remedy}")


@dataclass(frozen=True)
class Claims:
    """What a compressor promises beyond what all of them must keep. `check_compressor` tests it.

    Attributes:
        averages: what workers send is averaged by all-reduce, in all steps; otherwise it is
            gathered, and what a worker receives grows with their number.
        is_random: what is sent depends on random numbers of the step as well, or what is kept for
            the next one does. Otherwise steps of one kind (see `Compressor.step_kind`) differ in
            nothing but what they start from.
        is_unbiased: over these, the mean of what is decompressed is what was compressed.
        contraction: for a tensor's shape the largest δ that is known, such that what is not sent
            has at most (1 - δ) times the squared norm of what was compressed (where `is_random`,
            in the mean); None where nothing is known. 0 for all shapes says that it is never
            longer, random or not.
        linear: from equal shared state, workers get what one worker with the mean of all they
            compress would get, and c times as much of c times as much. True, or the kinds of
            steps (see `Compressor.step_kind`) that are so.
    """

    averages: bool
    is_random: bool = False
    is_unbiased: bool = False
    contraction: Callable[[Sequence[int]], float] | None = None
    linear: bool | frozenset[Hashable] = False

    def is_linear_in(self, step_kind: Hashable) -> bool:
        """Whether `linear` holds for steps of this kind."""
        return self.linear if isinstance(self.linear, bool) else step_kind in self.linear


class Compressor(ABC):
    """A member of the family, as the optimizer sees it: settings, and a maker of aggregators.

    Subclasses are frozen dataclasses, whose fields are the settings. One that works on one tensor
    at a time is easier made by `TensorCompressor`.

    Attributes:
        local_state: names in `initial_state` whose values are each worker's own. All others are
            the same on every worker.
    """

    local_state: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def claims(self) -> Claims:
        """What it promises beyond the laws that hold for all."""

    def payload_bytes(
        self,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype = torch.float32,
        step: int = 0,
        world_size: int = 1,
    ) -> int:
        """What one worker sends in a step for tensors of these shapes, control words apart.

        Args:
            shapes: of all tensors, also of those that it sends uncompressed.
            dtype: of errors and factors: float32, or float64 for parameters of that precision.
            step: counted from the first that compresses, where not all steps are the same.
            world_size: the number of workers, where it makes a difference.
        """
        own = self.settings()
        layout = Layout.plan(self.entry(i, shape, own) for i, shape in enumerate(shapes))
        placement = Placement(dtype, torch.device("cpu"), world_size=world_size)
        sent = self.compressed_bytes(layout, placement, step)
        return layout.vector_floats * dtype.itemsize + sent

    @abstractmethod
    def compressed_bytes(self, layout: Layout, placement: Placement, step: int) -> int:
        """What one worker sends for the compressed tensors of a layout; see `payload_bytes`."""

    def step_kind(self, step: int, settings: Settings) -> Hashable:
        """Steps of one kind ask for the same collectives. None where all do."""
        return None

    def settings(self) -> dict[str, Any]:
        """Entries it adds to each parameter group, with their defaults: plain numbers."""
        return {each.name: plain(getattr(self, each.name)) for each in fields_of(self)}

    def shared_settings(self) -> tuple[str, ...]:
        """Names of those settings that must be the same in every group."""
        return tuple(name for name in self.settings() if name == "seed")

    def validate(self, settings: Settings) -> None:
        """Checks the settings of a group.

        Raises:
            ValueError: a setting is of the wrong type or out of range.
        """

    @abstractmethod
    def level(self, shape: Sequence[int], settings: Settings) -> Hashable | None:
        """How far a tensor of this shape is compressed; None sends it uncompressed.

        A value by itself: tensors of one shape and equal levels share a batch.
        """

    def batch_dims_of(self, settings: Settings) -> int:
        """How many dimensions, the first, count what is compressed one by one: `batch_dims`."""
        return int(settings["batch_dims"]) if hasattr(self, "batch_dims") else 0

    def entry(self, index: int, shape: Sequence[int], settings: Settings) -> Entry:
        """The place in a layout of a tensor of this shape, as far as it is compressed."""
        level = self.level(shape, settings)
        return Entry(index, tuple(shape), level, self.batch_dims_of(settings))

    def initial_state(self, entry: Entry, settings: Settings) -> dict[str, Tensor]:
        """What is kept for one compressed parameter before the first step."""
        return {}

    @abstractmethod
    def aggregator(self, layout: Layout, settings: Settings, placement: Placement) -> Aggregator:
        """Makes the aggregator for one layout; its `state` is then overwritten by the caller."""


def fields_of(compressor: object) -> tuple[dataclasses.Field[Any], ...]:
    """The fields of a compressor, which must be a dataclass."""
    if not dataclasses.is_dataclass(compressor):
        remedy = (
            "Decorate it with @dataclasses.dataclass(frozen=True); its fields are the settings."
        )
        raise TypeError(
            f"Invalid compressor: {type(compressor).__name__} is no dataclass. {remedy}"
        )
    return dataclasses.fields(compressor)
