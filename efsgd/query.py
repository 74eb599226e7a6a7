"""The first Q: Algorithm 1, line 1."""

import torch
from torch import Tensor

from efsgd.randomness import generator_of

__all__ = ["initial_query"]


def initial_query(seed: int, index: int, m: int, r: int, *, step: int = 0) -> Tensor:
    """Q for one parameter before anything is known of it: i.i.d. standard normal.

    The same on every worker and in every run, whatever else draws random numbers; the global
    generator is not touched. Source: Algorithm 1, line 1.

    Args:
        seed: of the optimizer.
        index: the parameter's position in the optimizer.
        m: rows of Q, the columns of the gradient's matrix.
        r: columns of Q, the rank.
        step: number of the step it is drawn for; 0 for a warm start.

    Returns:
        [m, r], float64, on the CPU.

    Example:
        >>> from efsgd.query import initial_query
        >>> torch.equal(initial_query(0, 5, 3, 2), initial_query(0, 5, 3, 2))
        True
        >>> torch.equal(initial_query(0, 5, 3, 2), initial_query(0, 6, 3, 2))
        False
    """
    generator = generator_of(seed, index, step)
    return torch.randn(m, r, dtype=torch.float64, generator=generator, device="cpu")
