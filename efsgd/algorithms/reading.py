"""Messages read backwards: what the buffers of a step say of each parameter, to whoever sees them.

No step needs this. Each aggregator reads its own buffers, beside the code that fills them; see
`efsgd.audit`, which keeps copies of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from efsgd.layout import Blocks, Layout

#: What was sent, of a candidate for what was compressed; differentiable.
Measure: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Transcript:
    """What one worker handed to the collectives of a step for one bucket, and what came back.

    All tensors are copies. The vectors and control words are at the head of the first buffer.

    Attributes:
        step: the number of the step.
        public: what `Aggregator.public` was before the step.
        sent: the buffers, in the order in which they were handed over.
        answers: in the order in which they came; fewer than were sent where one failed.
    """

    step: int
    public: Sequence[Tensor]
    sent: Sequence[Tensor]
    answers: Sequence[Tensor]


@dataclass(frozen=True)
class Reading:
    """What a message says of one tensor; the attributes are those of `efsgd.audit.Observed`.

    Attributes:
        kind: how it was sent, in a word.
        values: what was sent, as floats.
        measure: the same of a candidate for what was compressed, differentiable.
        decompressed: what receivers make of it, of the tensor's shape.
        positions: of `values`, in the flattened tensor, where elements were sent as they are.
    """

    kind: str
    values: tuple[Tensor, ...]
    measure: Measure
    decompressed: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True)
class Packet:
    """One tensor on its way to another process, not by a collective: over a link of a pipeline.

    Attributes:
        name: what it is.
        step: the number of the step.
        worker: who sends it.
        shape: of the tensor.
        buffer: what was handed over, [nbytes] uint8; to be copied.
        read: reads a copy of it.
    """

    name: str
    step: int
    worker: int
    shape: torch.Size
    buffer: Tensor
    read: Callable[[Tensor], Reading]


def in_clear(tensor: Tensor, kind: str = "clear") -> Reading:
    """Reads a tensor that was sent as it is, or nearly so.

    Args:
        tensor: as it arrives, of any shape.
        kind: "clear"; "codes" where numbers were rounded.
    """
    return Reading(kind, (tensor,), lambda candidate: (candidate,), tensor)


def entries(decompressed: Tensor, positions: Tensor) -> Reading:
    """Reads elements that were sent as they are.

    Args:
        decompressed: the tensor with these elements, zeros elsewhere, of any shape.
        positions: of the elements in the flattened tensor, [k] int64.
    """
    values = decompressed.reshape(-1)[positions]

    def measure(candidate: Tensor) -> tuple[Tensor, ...]:
        return (candidate.reshape(-1)[positions],)

    return Reading("entries", (values,), measure, decompressed, positions)


def read_vectors(layout: Layout, buffer: Tensor) -> dict[int, Reading]:
    """What is sent uncompressed, by index, at the head of the first buffer of a step."""
    parts = buffer[layout.control_words : layout.vector_floats].split(
        [entry.numel for entry in layout.vectors]
    )
    return {
        entry.index: in_clear(part.view(entry.shape))
        for entry, part in zip(layout.vectors, parts, strict=True)
    }


def read_whole(layout: Layout, flat: Tensor) -> dict[int, Reading]:
    """Of all matrices of a layout, sent as they are."""
    blocks = Blocks(layout, flat.dtype, flat.device, flat=flat)
    return {index: in_clear(view) for index, view in blocks.views.items()}


def signs(is_positive: Tensor, decompressed: Tensor, scale: Tensor | None = None) -> Reading:
    """Reads signs; what is compared with them is tanh(J / mean abs(J)), which has a gradient.

    Args:
        is_positive: the signs, [numel] bool, true for +1.
        decompressed: the tensor, of any shape.
        scale: the mean magnitude of all elements, [1]; None where it was not sent.
    """
    sent = is_positive.to(decompressed.dtype).mul_(2).sub_(1).view(decompressed.shape)

    def measure(candidate: Tensor) -> tuple[Tensor, ...]:
        mean = candidate.abs().mean()
        smooth = torch.tanh(candidate / mean.clamp(min=torch.finfo(candidate.dtype).tiny))
        return (smooth,) if scale is None else (smooth, mean.view(1))

    return Reading("signs", (sent,) if scale is None else (sent, scale), measure, decompressed)


def part_of(reading: Reading, first: int, shape: tuple[int, ...]) -> Reading:
    """Of a part, from this element on, of what was sent as one flat tensor, element by element."""
    last = first + math.prod(shape)
    decompressed = reading.decompressed.view(-1)[first:last].view(shape)
    if reading.positions is None:
        return in_clear(decompressed, reading.kind)
    is_own = (reading.positions >= first) & (reading.positions < last)
    return entries(decompressed, reading.positions[is_own] - first)


def joined(readings: Sequence[Reading], places: Sequence[Any], decompressed: Tensor) -> Reading:
    """Of a tensor whose parts were read one by one; `places` are their indices in it."""

    def measure(candidate: Tensor) -> tuple[Tensor, ...]:
        parts = zip(readings, places, strict=True)
        return tuple(value for one, place in parts for value in one.measure(candidate[place]))

    values = tuple(value for one in readings for value in one.values)
    return Reading(readings[0].kind, values, measure, decompressed)
