"""One scale for a tensor, so that nothing overflows or vanishes on the way."""

import torch
from torch import Tensor

__all__ = ["power_of_two"]


def power_of_two(low: Tensor, high: Tensor) -> Tensor:
    """The largest power of two that is no larger than both bounds' magnitudes; 1 for zeros.

    Dividing by it changes no digit, and leaves elements below 2 in magnitude, the largest at least
    1: their differences and squares neither overflow nor all vanish.

    Args:
        low: the smallest element, [], floating point.
        high: the largest element, [].

    Returns:
        [], of the same dtype and device.

    Example:
        >>> from efsgd.scaling import power_of_two
        >>> power_of_two(*torch.aminmax(torch.tensor([3.0, -5.0])))
        tensor(4.)
    """
    largest = torch.maximum(-low, high)
    return torch.where(largest > 0, largest / (2 * torch.frexp(largest).mantissa), 1.0)
