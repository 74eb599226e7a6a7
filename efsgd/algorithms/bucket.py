"""The tensors of one device and dtype on one worker: what Algorithm 2 works on."""

from collections.abc import Container

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Aggregator
from efsgd.layout import Blocks, Layout
from efsgd.profiling import Phases
from efsgd.wire.control_words import ControlWords
from efsgd.wire.traffic import TrafficCounter

# What is added at once on a CPU: 1 MiB in float32, which stays in the cache from one operation to
# the next. Larger tensors are added by themselves.
FLOATS_OF_A_RUN = 2**18


class Bucket:
    """Errors and scratch of the tensors of one layout, and who compresses them.

    Attributes:
        layout: which tensor lies where.
        aggregator: compresses and aggregates; its `vectors` hold the uncompressed tensors.
        control: the control words that travel with the vectors.
        errors: the error memory e_w of the compressed tensors; None without error feedback.
        deltas: scratch for Δ_w; after line 9 it holds the next errors.
        pending_errors: by index, errors of tensors not compressed any more, which the next gradient
            takes along.
        indices: of all tensors.
        compressed: of those that are compressed.
        runs: those again, as they lie in memory, in parts that are worked on together.
        late_error: what this worker has met in this step after it had sent something.

    Args:
        dtype: of errors, deltas and updates.
        memory: for errors and deltas, [layout.matrix_floats] each; None: new memory, of zeros.
    """

    def __init__(
        self,
        layout: Layout,
        aggregator: Aggregator,
        control: ControlWords,
        dtype: torch.dtype,
        device: torch.device,
        *,
        error_feedback: bool = True,
        phases: Phases | None = None,
        traffic: TrafficCounter | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.layout, self.aggregator, self.control, self.device = (
            layout,
            aggregator,
            control,
            device,
        )
        self.traffic = TrafficCounter() if traffic is None else traffic
        self.phases = aggregator.phases = Phases() if phases is None else phases
        self.phases.devices.add(device)
        self.indices = frozenset(entry.index for entry in layout.entries)
        self.compressed = frozenset(e.index for batch in layout.batches for e in batch.entries)
        is_one = aggregator.placement.saves_launches
        floats = layout.matrix_floats if is_one else FLOATS_OF_A_RUN
        self.runs = runs_of(layout, floats, aggregator.added_ahead)
        kind, (own, scratch) = (dtype, device, aggregator.vectors), memory or (None, None)
        self.deltas = Blocks(layout, *kind, flat=scratch)
        self.errors = Blocks(layout, *kind, flat=own) if error_feedback else None
        self.pending_errors: dict[int, Tensor] = {}
        self.late_error: Exception | None = None

    def commit_(self, absent: frozenset[int]) -> None:
        """Makes the new errors and the compressor's new state those of the next step.

        Nothing of `absent` parameters, for which no worker had a gradient, is applied, so their
        errors stay what they are.
        """
        self.aggregator.commit_(absent)
        for index in self.pending_errors.keys() - absent:
            self.pending_errors.pop(index).zero_()
        if self.errors is not None:
            for index in absent & self.compressed:
                self.deltas.views[index].copy_(self.errors.views[index])
            self.errors, self.deltas = self.deltas, self.errors


def runs_of(
    layout: Layout, floats: int, left_out: Container[int] = ()
) -> list[tuple[tuple[int, ...], slice]]:
    """Compressed tensors that are neighbors in memory: their indices, and where they lie.

    Together they have at most so many elements, or it is one that has more. Some are `left_out`.
    """
    found: list[tuple[tuple[int, ...], slice]] = []
    indices, start, end = list[int](), 0, 0
    for entry in (entry for batch in layout.batches for entry in batch.entries):
        is_left_out = entry.index in left_out
        if indices and (is_left_out or end + entry.numel - start > floats):
            found.append((tuple(indices), slice(start, end)))
            indices, start = [], end
        end += entry.numel
        if is_left_out:
            start = end
        else:
            indices.append(entry.index)
    return [*found, (tuple(indices), slice(start, end))] if indices else found
