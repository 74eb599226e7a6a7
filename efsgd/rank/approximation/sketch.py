"""Norms of means over workers, from a few numbers of each worker.

A sketch adds the elements of a tensor, each with a random sign, into a few buckets chosen at
random, by the same choices on every worker. It is linear, so the mean of sketches is the sketch of
the mean; and its squared norm is that of the tensor, up to a relative error whose standard
deviation is at most √(2 / size).

Source: Charikar, Chen, Farach-Colton: "Finding frequent items in data streams", ICALP 2002 (the
sketch); Alon, Matias, Szegedy: "The space complexity of approximating the frequency moments", STOC
1996 (its norm).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from efsgd.randomness import generator_of
from efsgd.wire.collectives import AllReduceMean, Exchange

_AT_ONCE = 1 << 18  # elements for which random numbers are drawn together


def sketch(tensor: Tensor, size: int, seed: int) -> Tensor:
    """A tensor in `size` numbers, or all of it where it has no more, by random choices."""
    flat = tensor.reshape(-1)
    if flat.numel() <= size:
        return flat.clone()
    # Two buckets for one: what is drawn for the second half counts negative.
    found = torch.zeros(2 * size, dtype=flat.dtype, device=flat.device)
    generator = generator_of(seed)
    for part in flat.split(_AT_ONCE):
        drawn = torch.randint(2 * size, part.shape, generator=generator, device="cpu")
        found.index_add_(0, drawn.to(part.device), part)
    return found[:size] - found[size:]


def mean_norms(tensors: Iterable[Tensor], size: int | None, seed: int) -> Exchange[list[float]]:
    """The norms of the tensors' means over the workers, with a relative error of 1 / √(2·size).

    Of each tensor at most `size` numbers are sent (None: all). The workers' tensors have the same
    shapes, and the seed is the same.
    """
    parts = [
        own.reshape(-1) if size is None else sketch(own, size, seed + number)
        for number, own in enumerate(tensors)
    ]
    if not parts:
        return []
    device, sizes = parts[0].device, [part.numel() for part in parts]
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parts) else torch.float32
    buffer = torch.cat([part.to(device, dtype) for part in parts])
    mean = yield AllReduceMean(buffer, "sketches of accumulated gradients")
    norms = (torch.linalg.vector_norm(part, dtype=torch.float64) for part in mean.split(sizes))
    return list(map(float, norms))
