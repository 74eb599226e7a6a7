"""The elements of largest magnitude, found fast among millions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["largest"]

# Up to so many elements torch.topk is as fast.
FEW = 2**17
# From so many elements a threshold is guessed.
SAMPLES = 2**14
# What is looked through at once: 512 KiB in float32, which stays in the cache from one operation to
# the next.
AT_ONCE = 2**17


def largest(flat: Tensor, k: int) -> Tensor:
    """Positions of the k elements of largest magnitude; of equal ones any.

    torch.topk looks at every element several times, on a CPU. So a threshold is guessed from a
    sample, such that probably a few more than k are above it, and topk sees those alone. The
    result does not depend on the guess, and neither it nor the result on chance.

    Args:
        flat: [numel], finite.
        k: from 1 to numel.

    Returns:
        [k] int64, in ascending order.

    Example:
        >>> from efsgd.selection import largest
        >>> largest(torch.tensor([1.0, -3.0, 0.0, 2.0]), 2).tolist()
        [1, 3]
    """
    is_guessed = flat.device.type == "cpu" and flat.numel() > FEW
    threshold = _guess_threshold(flat, k) if is_guessed else None
    if threshold is None:
        return _top(flat, k)
    above = _where(flat, threshold, torch.gt)
    if len(above) >= k:
        return above[_top(flat[above], k)]
    # The threshold itself may be a value that is there many times: zero, for example.
    equal = _where(flat, threshold, torch.eq, limit=k - len(above))
    if len(above) + len(equal) == k:
        return torch.cat([above, equal]).sort().values
    return _top(flat, k)


def _top(flat: Tensor, k: int) -> Tensor:
    return torch.topk(flat.abs(), k, sorted=False).indices.sort().values


def _guess_threshold(flat: Tensor, k: int) -> Tensor | None:
    """A magnitude, [], that probably k elements exceed; None where that is no rare thing."""
    # An odd stride, so that a sample is not from few columns of a matrix.
    sample = flat[:: (flat.numel() // SAMPLES) | 1].abs()
    expected = k / flat.numel() * len(sample)
    # Four standard deviations of how many of the k are in a sample, and some where k is small.
    wanted = math.ceil(expected + 4 * math.sqrt(expected) + 4)
    if 4 * wanted > len(sample):
        return None
    return torch.topk(sample, wanted).values[-1]


def _where(
    flat: Tensor,
    threshold: Tensor,
    comparison: Callable[[Tensor, Tensor], Tensor],
    limit: int | None = None,
) -> Tensor:
    """Ascending positions, the first `limit`, whose magnitudes compare so with the threshold."""
    scratch = torch.empty(AT_ONCE, dtype=flat.dtype, device=flat.device)
    found: list[Tensor] = []
    total = 0
    for first in range(0, flat.numel(), AT_ONCE):
        part = flat[first : first + AT_ONCE]
        magnitudes = torch.abs(part, out=scratch[: len(part)])
        positions = comparison(magnitudes, threshold).nonzero().view(-1)
        found.append(positions.add_(first))
        total += len(positions)
        if limit is not None and total >= limit:
            break
    return torch.cat(found)[:limit]
