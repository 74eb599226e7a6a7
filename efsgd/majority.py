"""The majority of many votes of one bit each, counted a whole word of votes at a time.

Counts are kept in binary: the ones of all elements in one tensor, the twos in another, and so on.
To add a vote to them is to add one bit with carry, by a few logical operations on whole words.
"""

import torch
from torch import Tensor

__all__ = ["majority"]


def majority(ballots: Tensor) -> tuple[Tensor, Tensor]:
    """For each bit, whether more ballots have it set than not, and whether as many.

    Args:
        ballots: [voters, count], any integer dtype; bits of it are what is voted on.

    Returns:
        (more, as_many), each [count].

    Example:
        >>> from efsgd.majority import majority
        >>> more, as_many = majority(torch.tensor([[0b1100], [0b1010]]))
        >>> f"{more.item():04b} {as_many.item():04b}"
        '1000 0110'
    """
    voters = len(ballots)
    planes: list[Tensor] = []  # of the counts: ones, twos, fours, ...
    for ballot in ballots:
        carry = ballot
        for position, plane in enumerate(planes):
            planes[position], carry = plane ^ carry, plane & carry
        if len(planes) < voters.bit_length():
            planes.append(carry)
    half = voters // 2
    more = torch.zeros_like(ballots[0])
    equal = ~more
    for position, plane in reversed(list(enumerate(planes))):
        if half >> position & 1:
            equal = equal & plane
        else:
            more, equal = more | (equal & plane), equal & ~plane
    return more, equal if voters % 2 == 0 else torch.zeros_like(equal)
