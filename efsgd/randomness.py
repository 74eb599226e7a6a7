"""Random numbers that are the same in every run, and on every worker where they must be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch


def generator_of(*path: int) -> torch.Generator:
    """A generator on the CPU that belongs to a tuple of integers; the global one is not touched.

    A hash spreads neighbors over unrelated states.

    Example:
        >>> from efsgd.randomness import generator_of
        >>> torch.randint(100, (3,), generator=generator_of(0, 5)).tolist()
        [83, 0, 31]
    """
    digest = hashlib.blake2b("/".join(map(str, path)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


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
