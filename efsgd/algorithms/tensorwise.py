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

from efsgd.algorithms.interfaces import Aggregator, Compressed, Placement
from efsgd.algorithms.operators import Payload, Unit, units
from efsgd.algorithms.reading import Reading, Transcript, joined
from efsgd.layout import Blocks, Elementwise, Layout, Matrix
from efsgd.randomness import RowDraws
from efsgd.wire.collectives import AllGather, AllReduceMean, Exchange, Start
from efsgd.wire.control_words import all_finite
from efsgd.wire.payload import Format


class Tensorwise(Aggregator):
    """Compresses each tensor of one layout by the `Operator` that is its level.

    `averages` says whether payloads may be averaged; all fields are then values.
    """

    def __init__(self, layout: Layout, placement: Placement, *, averages: bool = False) -> None:
        super().__init__(layout, placement)
        self._averages, dtype, device = averages, placement.dtype, placement.device
        self._units = units(layout)
        fields = [unit.fields() for unit in self._units]
        if averages and any(each.dtype or each.bits for own in fields for each in own):
            raise ValueError(
                f"Invalid fields: {fields}. What is averaged must be plain values, Field(count), "
                f"without a dtype or bits; or set averages = False, to have them gathered."
            )
        self._format = Format(fields, dtype)
        payload_floats = self._format.nbytes // dtype.itemsize if averages else 0
        # What is handed to the all-reduce: [control words, vectors, averaged payloads].
        total = layout.vector_floats + payload_floats
        self._buffer = torch.zeros(total, dtype=dtype, device=device)
        self.vectors = self._buffer[: layout.vector_floats]
        self._bytes = self._buffer[layout.vector_floats :].view(torch.uint8)
        if not averages:
            self._bytes = torch.zeros(self._format.nbytes, dtype=torch.uint8, device=device)
        self._mean = Blocks(layout, dtype, device)

    def compress(self, deltas: Blocks, step: int) -> Exchange[Sent]:
        """Line 8: compresses each tensor.

        Nothing is sent yet, so that an error of the compressor, also in line 9, is met while no
        other worker counts on this one.
        """
        drawn: dict[Hashable, Any] = {}
        if self.abstains:  # what is sent is zeros, which decode to zeros
            return Sent(self, [], step, drawn)
        with self.phases("Alg. 2, line 8: compress"):
            payloads = [
                unit.compress(deltas.flat, self._draws(unit, step, drawn, self.placement.worker))
                for unit in self._units
            ]
            self._format.pack_(payloads, self._bytes)
        yield from ()
        return Sent(self, payloads, step, drawn)

    def aggregate(self, local: Sent) -> Exchange[Dense]:
        """Line 10: sends, and decompresses the mean of what all workers sent."""
        with self.phases("Alg. 2, line 10: exchange"):
            what = "vectors and payload" if self._averages else "vectors"
            in_flight = [(yield Start(AllReduceMean(self._buffer, what)))]
            if self._format.nbytes and not self._averages:
                in_flight.append((yield Start(AllGather(self._bytes, "payload"))))
            answers = []
            for each in in_flight:
                answers.append((yield each))
        with self.phases("Alg. 2, line 11: decompress"):
            flat = self._mean.flat.zero_()
            received = answers[1].unbind() if len(answers) > 1 else [self._bytes]
            for own in received:  # unpacked one at a time, for the sake of memory
                # Dividing first, so that a sum of finite numbers stays finite.
                alpha = 1 / len(received)
                self.add_(flat, self._format.unpack(own), local.step, alpha, local.drawn)
        return Dense(self._mean, is_finite=all_finite(flat))

    def read(self, said: Transcript) -> dict[int, Reading]:
        """What the payload of each tensor says, by its operator."""
        if not self._averages and len(said.sent) < 2:
            return {}
        head, blocks = self.layout.vector_floats, self.zeros()
        sent = said.sent[0][head:].view(torch.uint8) if self._averages else said.sent[1]
        found: dict[int, list[tuple[Matrix, Reading]]] = {}
        for unit, payload in zip(self._units, self._format.unpack(sent), strict=True):
            draws = self._draws(unit, said.step, None)
            unit.add_(blocks.flat, payload, draws, 1.0)
            for matrix, reading in unit.read(blocks.flat, payload, draws):
                found.setdefault(matrix.owner, []).append((matrix, reading))
        return {
            index: joined(
                [reading for _, reading in own],
                [matrix.place for matrix, _ in own],
                blocks.views[index],
            )
            for index, own in found.items()
        }

    def zeros(self) -> Blocks:
        """Memory for all compressed tensors."""
        return Blocks(self.layout, self.placement.dtype, self.placement.device)

    def add_(
        self,
        flat: Tensor,
        payloads: Sequence[Payload],
        step: int,
        alpha: float = 1.0,
        drawn: dict[Hashable, Any] | None = None,
    ) -> None:
        """Adds alpha times what one worker sent to all tensors in `flat` (modified in place)."""
        if self.abstains:
            return
        for unit, payload in zip(self._units, payloads, strict=True):
            unit.add_(flat, payload, self._draws(unit, step, drawn), alpha)

    def _draws(
        self,
        unit: Unit,
        step: int,
        drawn: dict[Hashable, Any] | None,
        worker: int | None = None,
    ) -> RowDraws:
        return RowDraws(unit.operator.seed_of_draws, unit.numbers, step, worker, drawn)


@dataclass(frozen=True)
class Sent(Compressed):
    """What one worker sends, not decompressed.

    `drawn` is what was drawn once for the step, and is kept as long as this is. See `Draws`.
    """

    aggregator: Tensorwise
    payloads: Sequence[Payload]
    step: int
    drawn: dict[Hashable, Any]

    def subtract_from_(self, blocks: Blocks) -> None:
        self.aggregator.add_(blocks.flat, self.payloads, self.step, -1.0, self.drawn)

    def decompress_with_(
        self, function: Elementwise, *operands: Mapping[int, Tensor], **options: Any
    ) -> None:
        self._decompressed().decompress_with_(function, *operands, **options)

    def squared_norms(self, wanted: Container[int]) -> list[Tensor]:
        return self._decompressed().squared_norms(wanted)

    def _decompressed(self) -> Dense:
        blocks = self.aggregator.zeros()
        self.aggregator.add_(blocks.flat, self.payloads, self.step, drawn=self.drawn)
        return Dense(blocks)


@dataclass(frozen=True)
class Dense(Compressed):
    """Tensors that are decompressed already, and whether all are finite, as far as it is known."""

    blocks: Blocks
    is_finite: bool = True

    def decompress_with_(
        self, function: Elementwise, *operands: Mapping[int, Tensor], **options: Any
    ) -> None:
        """Hands over all at once."""
        if wanted := [index for index in self.blocks.views if index in operands[0]]:
            others = ([each[index] for index in wanted] for each in operands)
            function([self.blocks.views[index] for index in wanted], *others, **options)

    def squared_norms(self, wanted: Container[int]) -> list[Tensor]:
        return [
            torch.linalg.vector_norm(own, dtype=torch.float64).square()
            for batch, matrices in zip(self.blocks.layout.batches, self.blocks.batches, strict=True)
            for matrix, own in zip(batch.matrices, matrices.unbind(), strict=True)
            if matrix.owner in wanted
        ]
