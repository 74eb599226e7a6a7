"""A few elements at a time: what is made of a long tensor on the way need not be as long."""

from collections.abc import Iterator

import torch
from torch import Tensor

from efsgd.algorithms.operators import ELEMENTS_AT_ONCE

# Up to so many elements tensors are compressed together where longer ones are better off alone.
SMALL = 2**14


def chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cuts contiguous tensors with equally many elements into matching chunks, flat views."""
    yield from zip(*(each.view(-1).split(ELEMENTS_AT_ONCE) for each in tensors), strict=True)


def power_of_two(low: Tensor, high: Tensor) -> Tensor:
    """The largest power of two that is no larger than the larger of two bounds; 1 for zeros.

    Dividing by it changes no digit, and leaves elements below 2 in magnitude, the largest at least
    1: their differences and squares neither overflow nor all vanish. The bounds are the smallest
    and the largest element, [].
    """
    largest = torch.maximum(-low, high)
    return torch.where(largest > 0, largest / (2 * torch.frexp(largest).mantissa), 1.0)


def uniform(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """From random bits, int64, as many numbers of float32 or float64 that are uniform in [0, 1)."""
    digits = 53 if dtype == torch.float64 else 24
    return (bits >> (64 - digits)).bitwise_and_((1 << digits) - 1).to(dtype).mul_(2.0**-digits)
