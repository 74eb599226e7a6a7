"""A few elements at a time: what is made of a long tensor on the way need not be as long."""

from collections.abc import Iterator

from torch import Tensor

__all__ = ["pieces"]

# 1 MiB in float32: it stays in the cache from one operation to the next.
_ELEMENTS_AT_ONCE = 2**18


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cuts tensors with equally many elements into like pieces.

    Args:
        tensors: contiguous.

    Yields:
        Of each tensor the next piece, one-dimensional, a view.

    Example:
        >>> from efsgd.pieces import pieces
        >>> [len(piece) for piece, in pieces(torch.zeros(1000, 600))]
        [262144, 262144, 75712]
    """
    yield from zip(*(each.view(-1).split(_ELEMENTS_AT_ONCE) for each in tensors), strict=True)
