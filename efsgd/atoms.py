"""Which atoms of a singular value decomposition are sent: a random sample of fixed size.

Source: Wang, Sievert, Charles, Liu, Wright, Papailiopoulos: "ATOMO: Communication-efficient
Learning via Atomic Sparsification", NeurIPS 2018, arXiv 1806.04090.
"""

import torch
from torch import Tensor

__all__ = ["draw_until", "inclusion_probabilities", "systematic_sample"]


def inclusion_probabilities(values: Tensor, count: int) -> Tensor:
    """The probabilities min(1, c·σ) that sum to `count`: those of least variance (water-filling).

    Source: ATOMO, Algorithm 1.

    Args:
        values: σ: [k] float64, at least 0, in descending order.
        count: the size of the sample, from 1 to k.

    Returns:
        [k] float64. Where less than `count` values are above 0, the first `count` are sure.

    Example:
        >>> from efsgd.atoms import inclusion_probabilities
        >>> inclusion_probabilities(torch.tensor([6.0, 2.0, 1.0, 1.0]), 2).tolist()
        [1.0, 0.5, 0.25, 0.25]
    """
    rests = values.flip(0).cumsum(0).flip(0)  # each value with all that follow
    places = count - torch.arange(len(values), device=values.device)
    is_sure = (places > 0) & (places * values >= rests)
    sure = int(is_sure.long().cumprod(0).sum())
    probabilities = torch.zeros_like(values)
    probabilities[:sure] = 1.0
    if sure < count:
        probabilities[sure:] = (count - sure) * values[sure:] / rests[sure]
    return probabilities


def systematic_sample(probabilities: Tensor, count: int, draw: float) -> Tensor:
    """A sample of exactly `count`, each with its own probability of being in it.

    The probabilities are laid end to end, from 0 to `count`. Of a comb whose teeth are one apart,
    and which is shifted by `draw`, each tooth picks the one on which it stands.

    Args:
        probabilities: [k] float64, in descending order, with a sum of `count`.
        count: the size of the sample.
        draw: uniform, from 0 to 1 (1 excluded).

    Returns:
        [count] int64, positions in ascending order.

    Example:
        >>> from efsgd.atoms import systematic_sample
        >>> p = torch.tensor([1.0, 0.5, 0.25, 0.25])
        >>> [systematic_sample(p, 2, draw).tolist() for draw in (0.0, 0.49, 0.5, 0.75)]
        [[0, 1], [0, 1], [0, 2], [0, 3]]
    """
    whole = torch.arange(count, dtype=probabilities.dtype, device=probabilities.device)
    teeth = torch.minimum(whole + draw, torch.nextafter(whole + 1, whole))  # 1 stays excluded
    found = torch.searchsorted(probabilities.cumsum(0), teeth, right=True)
    # Rounding may leave the last tooth beyond the end.
    return found.clamp_(max=int(probabilities.count_nonzero()) - 1)


def draw_until(
    probabilities: Tensor, count: int, generator: torch.Generator, tries: int
) -> Tensor | None:
    """Draws each on its own, again and again until exactly `count` are drawn.

    Args:
        probabilities: [k] float64.
        count: the size of the sample.
        generator: of random numbers, on the CPU, as are the probabilities.
        tries: after so many there is none.

    Returns:
        [count] int64, positions in ascending order, or None.
    """
    if count > int(probabilities.count_nonzero()):
        return None
    for _ in range(tries):
        drawn = torch.rand(
            probabilities.shape, dtype=torch.float64, generator=generator, device="cpu"
        )
        kept = (drawn < probabilities).nonzero().view(-1)
        if len(kept) == count:
            return kept
    return None
