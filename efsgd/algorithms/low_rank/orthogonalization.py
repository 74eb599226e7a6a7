"""Orthonormal columns for a batch of tall, thin matrices: Algorithm 1, line 5."""

import math

import torch
from torch import Tensor


def normalize_columns(matrices: Tensor) -> Tensor:
    """Scales each column by a power of two so that its largest entry lies in [0.5, 1).

    A power of two changes no digit, so whatever is computed from the result is bitwise
    the same for a matrix and for any power-of-two multiple of it, and squares and products
    neither overflow nor vanish. A column of zeros stays as it is.

    Args:
        matrices: [..., n, r], floating point. Not modified.

    Returns:
        A new tensor of the same shape and dtype.

    Example:
        >>> from efsgd.algorithms.low_rank.orthogonalization import normalize_columns
        >>> normalize_columns(torch.tensor([[3.0, 1e-30], [4.0, 0.0]]))[:, 0]
        tensor([0.3750, 0.5000])
    """
    largest = torch.linalg.vector_norm(matrices, ord=math.inf, dim=-2, keepdim=True)
    exponent = torch.frexp(largest).exponent
    # 2**exponent must itself be a normal number, at both ends of the dtype's range.
    limit = math.frexp(torch.finfo(matrices.dtype).max)[1] - 2
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp(-limit, limit).neg())
    return matrices * scale


def orthogonalize(matrices: Tensor) -> Tensor:
    """Orthonormal columns that span at least the columns of each matrix.

    What Gram-Schmidt gives in exact arithmetic, by Householder's QR decomposition of columns that
    were brought to one scale. Zero and linearly dependent columns are replaced by some unit
    vectors orthogonal to the others, so the result is orthonormal for every finite input, and
    nothing is ever divided by zero.

    Source: PowerSGD (arXiv 1905.13727), Algorithm 1, line 5.

    Args:
        matrices: [..., n, r] with r <= n, float32 or float64. Not modified.

    Returns:
        [..., n, r], the same dtype: columns of unit length, orthogonal to each other.

    Raises:
        ValueError: r > n, so that r orthonormal columns do not exist.

    Example:
        >>> from efsgd.algorithms.low_rank.orthogonalization import orthogonalize
        >>> p_hat = orthogonalize(torch.zeros(4, 2))
        >>> torch.allclose(p_hat.mT @ p_hat, torch.eye(2))
        True
    """
    n, r = matrices.shape[-2:]
    if r > n:
        raise ValueError(
            f"Invalid shape {tuple(matrices.shape)}: {r} orthonormal columns need at least {r} "
            f"rows. Clip the rank to min(n, m, rank)."
        )
    Q, R = torch.linalg.qr(normalize_columns(matrices))
    # Householder leaves the signs to chance; Gram-Schmidt's columns point along the given ones.
    signs = R.diagonal(dim1=-2, dim2=-1).signbit()
    orthonormal: Tensor = torch.where(signs.unsqueeze(-2), -Q, Q)
    return orthonormal
