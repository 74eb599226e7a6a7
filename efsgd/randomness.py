"""Random numbers that are the same in every run, and on every worker where they must be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor


def generator_of(*path: int) -> torch.Generator:
    """A generator on the CPU that belongs to a tuple of integers; the global one is not touched.

    A hash spreads neighbors over unrelated states.

    Example:
        >>> from efsgd.randomness import generator_of
        >>> torch.randint(100, (3,), generator=generator_of(0, 5)).tolist()
        [83, 0, 31]
    """
    return torch.Generator("cpu").manual_seed(_hash(path) >> 1)


def _hash(path: tuple[int, ...]) -> int:
    """64 bits."""
    digest = hashlib.blake2b("/".join(map(str, path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def random_bits(path: tuple[int, ...], indices: Tensor, count: int) -> Tensor:
    """Random numbers of 64 bits that belong to a tuple of integers, a stream for each index.

    They are a function of path, index and place, computed for all at once on any device, where
    generators would be made one after the other.

    Source: SplitMix64, of Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators",
    OOPSLA 2014, twice: of the indices it makes the places where their streams begin.

    Args:
        path: what they belong to.
        indices: of the streams, [rows] int64.
        count: how many of each.

    Returns:
        [rows, count] int64, all values equally likely.

    Example:
        >>> from efsgd.randomness import random_bits
        >>> random_bits((0, 5), torch.tensor([7, 8]), 2)[1] == random_bits(
        ...     (0, 5), torch.tensor([8]), 2
        ... )
        tensor([[True, True]])
    """
    first = _scramble_(indices * _STRIDE + _signed(_hash(path)))
    places = torch.arange(1, count + 1, device=indices.device)
    return _scramble_(first.unsqueeze(1) + places * _STRIDE)


def _signed(number: int) -> int:
    """What 64 bits are as int64."""
    return number - (number >> 63 << 64)


# Of SplitMix64: the step from number to number, and shifts and factors that scramble them.
_STRIDE = _signed(0x9E3779B97F4A7C15)
_ROUNDS = (30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)), (31, 1)


def _scramble_(numbers: Tensor) -> Tensor:
    """A bijection of int64 after which neighbors have nothing in common (modified in place)."""
    for shift, factor in _ROUNDS:
        numbers ^= (numbers >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        if factor != 1:
            numbers *= factor
    return numbers


T = TypeVar("T")


@dataclass(frozen=True)
class Draws:
    """Where random numbers for one tensor and one step come from. All calls begin anew.

    Attributes:
        seed: of the compressor.
        index: of the parameter; where some are stacks of matrices, which matrix it is of all.
        step: the number of the step.
        worker: this worker; None where all decompress the same.
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
            make: is given what `shared` returns. What it returns is not to be modified, and kept
                until the end of the step.
        """
        whole = (self.seed, self.index, self.step, key)
        return _once(self.drawn, whole, lambda: make(self.shared()))

    def private(self) -> torch.Generator:
        """Another one on each worker, for compressing only."""
        if self.worker is None:
            raise RuntimeError(_NOT_PRIVATE)
        return generator_of(self.seed, self.index, self.step, self.worker)

    def as_rows(self) -> RowDraws:
        """The same for a batch of this one tensor."""
        return RowDraws(self.seed, (self.index,), self.step, self.worker, self.drawn)


@dataclass(frozen=True)
class RowDraws:
    """Where random numbers come from for tensors that are compressed together, as rows of one.

    `draws[row]` are those of one of them. What `shared_bits` and `private_bits` return for a row
    depends on its own tensor alone, whatever others there are.

    Attributes:
        seed: of the compressor.
        indices: of the rows, as `Draws.index`.
        step: the number of the step.
        worker: this worker; None where all decompress the same.
        drawn: what `shared_once` has made in this step; None remembers nothing.
    """

    seed: int
    indices: tuple[int, ...]
    step: int
    worker: int | None
    drawn: dict[Hashable, Any] | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, row: int) -> Draws:
        return Draws(self.seed, self.indices[row], self.step, self.worker, self.drawn)

    def shared_bits(self, count: int, device: torch.device) -> Tensor:
        """Random numbers of 64 bits, the same on every worker: [rows, count] int64."""
        return random_bits((self.seed, self.step), self._indices(device), count)

    def private_bits(self, count: int, device: torch.device) -> Tensor:
        """Others on each worker, for compressing only: [rows, count] int64."""
        if self.worker is None:
            raise RuntimeError(_NOT_PRIVATE)
        path = self.seed, self.step, self.worker
        return random_bits(path, self._indices(device), count)

    def shared_once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What is made from the shared numbers of all rows: once in a step, as by `Draws`."""
        return _once(self.drawn, (self.seed, self.indices, self.step, key), make)

    def _indices(self, device: torch.device) -> Tensor:
        return torch.tensor(self.indices, dtype=torch.int64, device=device)


_NOT_PRIVATE = "Only compress can draw private numbers: nobody else knows them."


def _once(drawn: dict[Hashable, Any] | None, key: Hashable, make: Callable[[], T]) -> T:
    """What is remembered under a key, or else made and remembered."""
    if drawn is None:
        return make()
    if key not in drawn:
        drawn[key] = make()
    found: T = drawn[key]
    return found
