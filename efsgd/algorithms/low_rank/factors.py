"""Factors of another rank: what was learned is kept.

Columns span the subspace from which the next step of power iteration starts; their scales say how
much each of its directions counted in the last one.
"""

import torch
from torch import Tensor

from efsgd.layout import is_fake
from efsgd.randomness import generator_of

# Columns that nothing is known of count less than any that was learned, should the rank shrink
# again before a step has been taken.
_UNKNOWN = 2.0**-10
# What a column of zeros may become by rotation, in float64, beside the longest.
_ROUNDING = 2.0**-44


def resized(kept: Tensor, fresh: Tensor) -> Tensor:
    """A factor, [m, r], with as many columns as another one, [m, r'], which is drawn at random.

    Where there are fewer, the factor is rotated by its SVD and keeps the columns of its largest
    singular values: of all subspaces of that dimension, the one that has most of what the last step
    found. Where there are more, and where one is zero or rounding, they point where those of
    `fresh` do, and are shorter than all that were learned.

    The result is float64, on the CPU: the same bits for the same values, whatever their strides, on
    workers of one kind. Between processors of several kinds it may differ by rounding, which the
    mean of the next step takes away.
    """
    # Contiguous, as sums of other strides have other bits: a state in training is a view, a loaded
    # one is not.
    known, drawn = (tensor.detach().double().cpu().contiguous() for tensor in (kept, fresh))
    columns = drawn.shape[-1]
    if is_fake(known):
        return drawn
    if columns < known.shape[-1]:
        known = _rotated(known)[:, :columns]
    norms = torch.linalg.vector_norm(known, dim=0)
    is_learned = norms > max(torch.finfo(kept.dtype).eps, _ROUNDING) * norms.max()
    found, is_new = drawn.clone(), torch.ones(columns, dtype=torch.bool, device="cpu")
    is_new[: len(norms)] = ~is_learned
    found[:, ~is_new] = known[:, is_learned]
    if is_learned.any():
        least = norms[is_learned].min() * _UNKNOWN
        ratios = least.clamp_min(_smallest(kept.dtype)) / drawn[:, is_new].norm(dim=0)
        # Powers of two: then no digit of what is computed from these columns is another.
        found[:, is_new] *= torch.ldexp(torch.ones_like(ratios), torch.frexp(ratios).exponent - 1)
    return found


def _smallest(dtype: torch.dtype) -> float:
    """What a column's length must have for its elements to be normal numbers."""
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def _rotated(known: Tensor) -> Tensor:
    """Q V, from Q = U S V^T: columns are orthogonal, the longest first.

    LAPACK leaves open the sign of V's columns: the largest element of each is made positive, so
    that workers with other processors do not subtract what they should add.
    """
    V = torch.linalg.svd(known, full_matrices=False)[2].mT
    largest = V.gather(0, V.abs().argmax(dim=0, keepdim=True))
    rotated: Tensor = known @ (V * torch.where(largest < 0, -1.0, 1.0))
    return rotated


def initial_query(seed: int, index: int, m: int, r: int, *, step: int = 0) -> Tensor:
    """Q, [m, r] float64 on the CPU, before anything is known of it: i.i.d. standard normal.

    The same on every worker and in every run, whatever else draws random numbers. With a warm start
    `step` is 0. Source: Algorithm 1, line 1.
    """
    generator = generator_of(seed, index, step)
    return torch.randn(m, r, dtype=torch.float64, generator=generator, device="cpu")
