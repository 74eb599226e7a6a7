"""Made-up gradients, the same in every run: kinds that are hard on compressors."""

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from efsgd.randomness import generator_of

#: By worker, and by parameter.
Gradients: TypeAlias = list[list[Tensor | None]]

#: What gradients may look like.
KINDS = ("gaussian", "one_hot", "scaled", "rank_deficient", "constant", "zero")

#: The same, with few elements that are not zero, and of sizes near the ends of float32.
EVERY_KIND = (*KINDS, "sparse", "huge", "tiny")

# Keeps these draws apart from those of other parts of the package.
_GRADIENTS = 7_001


def gaussian(shape: Sequence[int], *path: int) -> Tensor:
    """Standard normal, float64, on the CPU, from a generator of its own."""
    generator = generator_of(_GRADIENTS, *path)
    return torch.randn(torch.Size(shape), generator=generator, dtype=torch.float64, device="cpu")


def made_up(kind: str, shape: Sequence[int], worker: int, *path: int) -> Tensor:
    """One worker's gradient of one parameter, float64: of `EVERY_KIND`, drawn by `path`.

    Example:
        >>> from efsgd.testing.gradients import made_up
        >>> made_up("one_hot", (3, 3), 0).count_nonzero()
        tensor(1)
    """
    numel = math.prod(shape)
    if kind == "zero" or numel == 0:
        return torch.zeros(torch.Size(shape), dtype=torch.float64, device="cpu")
    if kind == "scaled":  # small workers must be heard beside large ones
        return 10.0 ** (3 * (worker % 3) - 3) * gaussian(shape, worker, *path)
    if kind == "one_hot":
        found = torch.zeros(numel, dtype=torch.float64, device="cpu")
        generator = generator_of(_GRADIENTS, worker, *path)
        found[torch.randint(numel, (), generator=generator, device="cpu")] = 1.0
        return found.view(torch.Size(shape))
    if kind == "constant":
        return gaussian((), worker, *path).expand(torch.Size(shape)).clone()
    if kind == "rank_deficient" and len(shape) > 1:
        left = gaussian(shape[:1], worker, 0, *path)
        right = gaussian(shape[1:], worker, 1, *path).flatten()
        return torch.outer(left, right).view(torch.Size(shape))
    found = gaussian(shape, worker, *path)
    if kind == "sparse":  # one element in eight, or none
        return found.where(gaussian(shape, worker, 2, *path) > 1.15, 0.0)
    return {"huge": 1e30, "tiny": 1e-30}.get(kind, 1.0) * found


def gradients(
    shapes: Sequence[Sequence[int]],
    world_size: int,
    step: int,
    seed: int,
    *,
    kinds: Sequence[str] = KINDS,
    scale: float = 1.0,
    with_missing: bool = False,
) -> Gradients:
    """All workers' gradients of one step: parameters take `kinds` in turn, another in each step.

    With `with_missing` some are None, on some workers or on all.
    """
    found: Gradients = []
    for worker in range(world_size):
        own: list[Tensor | None] = []
        for index, shape in enumerate(shapes):
            kind = kinds[(index + step) % len(kinds)]
            is_missing = (step + 2 * worker + index) % 5 == 1 or (step % 3, index % 3) == (2, 1)
            made = scale * made_up(kind, shape, worker, seed, step, index)
            own.append(None if with_missing and is_missing else made)
        found.append(own)
    return found
