"""Algorithm 2, lines 8 and 10, for compressors that work on one tensor at a time.

Source: Vogels, Karimireddy, Jaggi: "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization", NeurIPS 2019, arXiv 1905.13727.

Payloads that may be averaged ride with the vectors in one all-reduce. All others are gathered: they
are decompressed worker by worker, in worker order, and the sum is the same on every worker.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.operators import Payload, Unit, units
from efsgd.layout import Blocks, Elementwise, Layout
from efsgd.profiling import Phases
from efsgd.randomness import Draws
from efsgd.wire.collectives import AllGather, AllReduceMean, Exchange, Start
from efsgd.wire.control_words import all_finite
from efsgd.wire.payload import Format, require_tensors


class Tensorwise:
    """Compresses each tensor of one layout by the operator that is its level.

    Attributes:
        vectors: see `efsgd.compressors.Aggregator`.
        rounding: always the same.
        shows_nonfinite: False; payloads need not show everything.

    Args:
        layout: the plan; the level of an entry is its `Operator`.
        dtype: of deltas.
        device: of deltas.
        worker: this worker.
        averages: whether payloads may be averaged; all fields are then values.
    """

    numerics = "eager"
    shows_nonfinite = False

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        worker: int = 0,
        *,
        averages: bool = False,
    ) -> None:
        self.layout, self.phases = layout, Phases()
        self._worker, self._averages = worker, averages
        self._units = units(layout)
        fields = [tuple(unit.operator.fields(unit.shape)) for unit in self._units]
        if averages and any(each.dtype or each.bits for own in fields for each in own):
            raise ValueError(
                f"Invalid fields: {fields}. What is averaged must be plain values, Field(count), "
                f"without a dtype or bits; or set averages = False, to have them gathered."
            )
        self._sizes = [[each.count for each in own] for own in fields]
        payload_floats = sum(map(sum, self._sizes)) if averages else 0
        # What is handed to the all-reduce: [control words, vectors, averaged payloads].
        self._buffer = torch.zeros(
            layout.vector_floats + payload_floats, dtype=dtype, device=device
        )
        self.vectors = self._buffer[: layout.vector_floats]
        self._format = Format([] if averages else fields, dtype)
        self._bytes = torch.zeros(self._format.nbytes, dtype=torch.uint8, device=device)
        self._mean = Blocks(layout, dtype, device)

    def prepare(self, *_: Any) -> None:
        """Nothing to do."""

    def compress(self, deltas: Blocks, step: int) -> Exchange[Sent]:
        """Line 8: compresses each tensor. Nothing is sent yet.

        So that an error of the compressor, also in line 9, is met while no other worker counts on
        this one.
        """
        drawn: dict[Hashable, Any] = {}
        with self.phases("Alg. 2, line 8: compress"):
            payloads = [
                unit.operator.compress(
                    unit.of(deltas.flat), self._draws(unit, step, drawn, self._worker)
                )
                for unit in self._units
            ]
            if self._averages:
                self._fill_buffer_(payloads)
            else:
                self._format.pack_(payloads, self._bytes)
        yield from ()
        return Sent(self, payloads, step, drawn)

    def aggregate(self, local: Sent) -> Exchange[Dense]:
        """Line 10: sends, and decompresses the mean of what all workers sent."""
        with self.phases("Alg. 2, line 10: exchange"):
            what = "vectors and payload" if self._averages else "vectors"
            in_flight = [(yield Start(AllReduceMean(self._buffer, what)))]
            if self._format.nbytes:
                in_flight.append((yield Start(AllGather(self._bytes, "payload"))))
            answers = []
            for each in in_flight:
                answers.append((yield each))
        with self.phases("Alg. 2, line 11: decompress"):
            flat = self._mean.flat.zero_()
            if self._averages:
                self.add_(flat, self._split_buffer(), local.step, drawn=local.drawn)
            elif len(answers) > 1:
                received = answers[1].unbind()
                for own in received:  # unpacked one at a time, for the sake of memory
                    # Dividing first, so that a sum of finite numbers stays finite.
                    alpha = 1 / len(received)
                    self.add_(flat, self._format.unpack(own), local.step, alpha, local.drawn)
        return Dense(self.layout, self._mean, is_finite=all_finite(flat))

    def add_(
        self,
        flat: Tensor,
        payloads: Sequence[Payload],
        step: int,
        alpha: float = 1.0,
        drawn: dict[Hashable, Any] | None = None,
    ) -> None:
        """Adds alpha times what one worker sent to all tensors (modified in place).

        Args:
            flat: the tensors, as in `Blocks.flat`.
            payloads: of each unit.
            step: the number of the step.
            alpha: a number.
            drawn: what was drawn once for the step; see `Draws`.
        """
        for unit, payload in zip(self._units, payloads, strict=True):
            unit.add_(flat, payload, self._draws(unit, step, drawn), alpha)

    def commit_(self, absent: frozenset[int]) -> None:
        """Nothing is kept from step to step."""

    def state(self) -> dict[int, dict[str, Tensor]]:
        """Nothing is kept from step to step."""
        return {entry.index: {} for batch in self.layout.batches for entry in batch.entries}

    def _draws(
        self,
        unit: Unit,
        step: int,
        drawn: dict[Hashable, Any] | None,
        worker: int | None = None,
    ) -> Draws:
        return Draws(unit.operator.seed_of_draws, unit.index, step, worker, drawn)

    def _fill_buffer_(self, payloads: Sequence[Payload]) -> None:
        for payload in payloads:
            require_tensors(payload)
        parts = [part for payload in payloads for part in payload]
        sizes = [size for own in self._sizes for size in own]
        if [tuple(part.shape) for part in parts] != [(size,) for size in sizes]:
            raise ValueError(
                f"Invalid payload: fields have shapes {[list(part.shape) for part in parts]} and "
                f"must have {[[size] for size in sizes]}, as the compressor's `fields` announce."
            )
        if parts:
            self._buffer[self.layout.vector_floats :] = torch.cat(parts)

    def _split_buffer(self) -> list[Payload]:
        found: list[Payload] = []
        flat = self._buffer[self.layout.vector_floats :]
        for own in self._sizes:
            found.append(flat[: sum(own)].split(own))
            flat = flat[sum(own) :]
        return found


@dataclass(frozen=True)
class Sent:
    """What one worker sends, not decompressed.

    Attributes:
        aggregator: that made it.
        payloads: of each unit.
        step: the number of the step.
        drawn: what was drawn once for the step; it is kept as long as this is.
    """

    aggregator: Tensorwise
    payloads: Sequence[Payload]
    step: int
    drawn: dict[Hashable, Any]
    is_finite: bool = True

    def subtract_from_(self, blocks: Blocks) -> None:
        """See `efsgd.compressors.Compressed`."""
        self.aggregator.add_(blocks.flat, self.payloads, self.step, -1.0, self.drawn)

    def decompress_with_(
        self, function: Elementwise, *operands: Mapping[int, Tensor], **options: Any
    ) -> None:
        """See `efsgd.compressors.Compressed`."""
        self._decompressed().decompress_with_(function, *operands, **options)

    def squared_norms(self, wanted: Container[int]) -> list[Tensor]:
        """See `efsgd.compressors.Compressed`."""
        return self._decompressed().squared_norms(wanted)

    def _decompressed(self) -> Dense:
        mean = self.aggregator._mean
        blocks = Blocks(self.aggregator.layout, mean.flat.dtype, mean.flat.device)
        self.aggregator.add_(blocks.flat, self.payloads, self.step, drawn=self.drawn)
        return Dense(self.aggregator.layout, blocks)


@dataclass(frozen=True)
class Dense:
    """Tensors that are decompressed already.

    Attributes:
        layout: whose they are.
        blocks: their values.
        is_finite: whether all of them are, as far as it is known.
    """

    layout: Layout
    blocks: Blocks
    is_finite: bool = True

    def decompress_with_(
        self, function: Elementwise, *operands: Mapping[int, Tensor], **options: Any
    ) -> None:
        """Hands over all at once. See `efsgd.compressors.Compressed`."""
        wanted = [index for index in self.blocks.views if index in operands[0]]
        if wanted:
            values = [self.blocks.views[index] for index in wanted]
            function(values, *([each[index] for index in wanted] for each in operands), **options)

    def subtract_from_(self, blocks: Blocks) -> None:
        """See `efsgd.compressors.Compressed`."""
        blocks.flat.sub_(self.blocks.flat)

    def squared_norms(self, wanted: Container[int]) -> list[Tensor]:
        """See `efsgd.compressors.Compressed`."""
        return [
            torch.linalg.vector_norm(view, dtype=torch.float64).square()
            for index, view in self.blocks.views.items()
            if index in wanted
        ]
