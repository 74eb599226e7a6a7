"""What Algorithm 2 asks of a compressor. It names none."""

from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from efsgd.layout import Blocks, Elementwise, Entry, Layout
from efsgd.profiling import Phases
from efsgd.wire.collectives import Exchange


class Compressed(Protocol):
    """A compressed form of the matrices of a layout, not yet multiplied out.

    Attributes:
        is_finite: of a mean, False where it is known that decompressed numbers are not; the same
            on every worker. The floats that collectives carry are looked at elsewhere.
    """

    @property
    def is_finite(self) -> bool:
        """See above."""

    def decompress_with_(
        self, function: Elementwise, *operands: Mapping[int, Tensor], **options: Any
    ) -> None:
        """Decompresses and hands over a few pieces at a time, so that nothing is kept whole.

        Args:
            function: is given the pieces. What it does to one element must not depend on others.
            operands: tensors by parameter index, all with the same indices, in the parameters'
                shapes (`function` may modify them). Matrices without an index in them are left
                out; indices that are no matrices of the layout are ignored.
            options: passed on to `function`: numbers, and flags.
        """

    def subtract_from_(self, blocks: Blocks) -> None:
        """Subtracts the decompressed matrices from `blocks` (modified in place)."""

    def squared_norms(self, wanted: Container[int]) -> list[Tensor]:
        """The sums of squares of the decompressed matrices with these indices, each [] float64."""


class Aggregator(Protocol):
    """Algorithm 2, lines 8 and 10, for the tensors of one layout.

    Laws: all workers obtain the bitwise same mean; the collectives that are asked for depend on
    the layout and the kind of the step alone (see `Compressor.step_kind`); what is kept from step
    to step changes in `commit_` and nowhere else.

    Attributes:
        vectors: flat buffer [layout.vector_floats]. Holds this worker's values when `compress` is
            called and their mean once `aggregate` has returned. The first collective's buffer
            begins with them, this memory itself or a copy, and is answered before any other.
        rounding: a word for how this worker rounds, where that may differ from another's with the
            same settings. Workers with different words refuse to train together.
        phases: names the phases of a step; set by the bucket that the aggregator works for.
        shows_nonfinite: whether its first buffer is not finite wherever a delta is not. Otherwise
            deltas are looked through first, which costs a pass, and those that are not finite are
            replaced by zeros; nothing of them is sent.
    """

    vectors: Tensor
    phases: Phases
    shows_nonfinite: bool

    @property
    def numerics(self) -> str:
        """See above; may change in `prepare` alone."""

    def prepare(
        self,
        function: Elementwise,
        operands: Sequence[Mapping[int, Tensor]],
        options: Mapping[str, Any],
    ) -> None:
        """Before a step: makes ready what `decompress_with_` will be asked for; changes nothing."""

    def compress(self, deltas: Blocks, step: int) -> Exchange[Compressed]:
        """Line 8: this worker's own compressed form of `deltas`, which is not modified."""

    def aggregate(self, local: Any) -> Exchange[Compressed]:
        """Line 10: the mean over the workers of what `compress` returned."""

    def commit_(self, absent: frozenset[int]) -> None:
        """The step holds: keep what the next one starts from, except for `absent` parameters."""

    def state(self) -> dict[int, dict[str, Tensor]]:
        """What is kept from step to step, by parameter index and name: live views."""


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
    """

    averages: bool
    is_random: bool = False
    is_unbiased: bool = False
    contraction: Callable[[Sequence[int]], float] | None = None


class Compressor(Protocol):
    """A member of the family, as the optimizer sees it: settings, and a maker of aggregators.

    One that works on one tensor at a time is easier made by `TensorCompressor`.
    """

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
            step: counted from the first that compresses, where not all steps are alike.
            world_size: the number of workers, where it makes a difference.
        """

    def step_kind(self, step: int, settings: Mapping[str, Any]) -> Hashable:
        """Steps of one kind ask for the same collectives. None where all do."""

    def settings(self) -> dict[str, Any]:
        """Entries it adds to each parameter group, with their defaults: plain numbers."""

    def shared_settings(self) -> tuple[str, ...]:
        """Names of those settings that must be the same in every group."""

    def validate(self, settings: Mapping[str, Any]) -> None:
        """Raises ValueError where the settings of a group make no sense."""

    def level(self, shape: Sequence[int], settings: Mapping[str, Any]) -> Hashable | None:
        """How far a tensor of this shape is compressed; None sends it uncompressed."""

    def initial_state(self, entry: Entry, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """What is kept for one compressed parameter before the first step."""

    def aggregator(
        self,
        layout: Layout,
        settings: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        worker: int = 0,
        world_size: int = 1,
    ) -> Aggregator:
        """Makes the aggregator for one layout; its `state` is then overwritten by the caller."""
