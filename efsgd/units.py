"""What a compressor of tensors is to its aggregator, and what it is given as one tensor."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from efsgd.blocks import Layout
from efsgd.payload import Field
from efsgd.randomness import generator_of

__all__ = ["Draws", "Operator", "Payload", "Unit", "units"]

#: What is sent for one tensor: its fields, in the order in which they were announced.
Payload = Sequence[Tensor]

T = TypeVar("T")


@dataclass(frozen=True)
class Draws:
    """Where random numbers for one tensor and one step come from. All calls begin anew.

    Attributes:
        seed: of the compressor.
        index: of the parameter.
        step: the number of the step.
        worker: this worker; None where all decompress alike.
        drawn: what `shared_once` has made in this step, for all tensors; None remembers nothing.
    """

    seed: int
    index: int
    step: int
    worker: int | None
    drawn: dict[Hashable, Any] | None = field(default=None, repr=False, compare=False)

    def shared(self) -> torch.Generator:
        """The same on every worker, when compressing and when decompressing."""
        return generator_of(self.seed, self.index, self.step)

    def shared_once(self, key: Hashable, make: Callable[[torch.Generator], T]) -> T:
        """What is made from the shared numbers, for what takes long: made once in a step.

        A tensor is decompressed as often as there are payloads of it, and once more for what is
        not sent; with `shared` each draws again.

        Args:
            key: all that the result depends on beside the numbers, for example sizes and the
                device.
            make: is given what `shared` returns.

        Returns:
            What `make` returned, then or now. Not to be modified. It is kept until the end of the
            step.
        """
        if self.drawn is None:
            return make(self.shared())
        whole = (self.seed, self.index, self.step, key)
        if whole not in self.drawn:
            self.drawn[whole] = make(self.shared())
        found: T = self.drawn[whole]
        return found

    def private(self) -> torch.Generator:
        """Another one on each worker, for compressing only."""
        if self.worker is None:
            raise RuntimeError("Only compress can draw private numbers: nobody else knows them.")
        return generator_of(self.seed, self.index, self.step, self.worker)


class Operator(Protocol):
    """Compresses a tensor and decompresses it; see `efsgd.TensorCompressor`."""

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        """What is sent for a tensor of this shape."""

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        """The payload of a tensor, which is not modified."""

    def add_decompressed_(self, out: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        """Adds alpha times the decompressed tensor to `out` (modified in place)."""

    @property
    def seed_of_draws(self) -> int:
        """The seed of all that it draws."""

    @property
    def takes_all_at_once(self) -> bool:
        """Whether it sees all tensors as one flat one."""


class Unit:
    """What is compressed as one tensor: one parameter, or all of one level, one after the other.

    Args:
        operator: compresses it.
        index: of the (first) parameter.
        shape: as which it is seen.
        slices: where it lies in `Blocks.flat`.
    """

    def __init__(
        self, operator: Operator, index: int, shape: tuple[int, ...], slices: Sequence[slice]
    ) -> None:
        self.operator, self.index, self.shape = operator, index, torch.Size(shape)
        self._slices: list[slice] = []
        for own in slices:
            if self._slices and self._slices[-1].stop == own.start:
                own = slice(self._slices.pop().start, own.stop)
            self._slices.append(own)

    def of(self, flat: Tensor) -> Tensor:
        """The tensor, a view wherever it lies in one piece."""
        parts = [flat[own] for own in self._slices]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(self.shape)

    def add_(self, flat: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        """Adds alpha times the decompressed payload to its place (modified in place)."""
        out = self.of(flat)
        self.operator.add_decompressed_(out, payload, draws, alpha)
        if len(self._slices) > 1:
            sizes = [own.stop - own.start for own in self._slices]
            for own, part in zip(self._slices, out.view(-1).split(sizes), strict=True):
                flat[own] = part


def units(layout: Layout) -> list[Unit]:
    """All units of a layout, whose levels are operators."""
    found, first = [], 0
    together: dict[Hashable, tuple[int, list[slice]]] = {}
    for batch in layout.batches:
        operator: Any = batch.level
        for entry in batch.entries:
            own = slice(first, first + entry.numel)
            first = own.stop
            if operator.takes_all_at_once:
                together.setdefault(operator, (entry.index, []))[1].append(own)
            else:
                found.append(Unit(operator, entry.index, entry.shape, [own]))
    for key, (index, slices) in together.items():
        joined: Any = key
        total = sum(own.stop - own.start for own in slices)
        found.append(Unit(joined, index, (total,), slices))
    return found
