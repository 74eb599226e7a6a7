"""Floats as multiples of one unit, so that sums of them are exact."""

import math
from collections.abc import Sequence
from fractions import Fraction

__all__ = ["as_integers", "limit_of"]


def as_integers(rows: Sequence[Sequence[float]]) -> tuple[list[list[int]], Fraction]:
    """The numbers as multiples of the largest unit there is for all of them.

    Args:
        rows: finite numbers.

    Returns:
        The multiples, and the unit.

    Example:
        >>> from efsgd.rank.allocation.integers import as_integers
        >>> as_integers([[0.5, 1.25], [3.0]])
        ([[2, 5], [12]], Fraction(1, 4))
    """
    ratios = [[number.as_integer_ratio() for number in row] for row in rows]
    shared = math.lcm(*(below for row in ratios for _, below in row))
    scaled = [[above * (shared // below) for above, below in row] for row in ratios]
    divisor = math.gcd(*(number for row in scaled for number in row)) or 1
    return [[number // divisor for number in row] for row in scaled], Fraction(divisor, shared)


def limit_of(budget: float, unit: Fraction) -> int:
    """The most units of which the nearest float, as `math.fsum` gives it, is within the budget.

    Args:
        budget: at least 0, less than the largest float.
        unit: above 0.

    Example:
        >>> from efsgd.rank.allocation.integers import limit_of
        >>> from fractions import Fraction
        >>> limit_of(0.75, Fraction(1, 4)), limit_of(0.3, Fraction(1, 4))
        (3, 1)
    """
    halfway = Fraction(budget) + Fraction(math.ulp(budget)) / 2
    limit = math.floor(halfway / unit)
    return limit if float(limit * unit) <= budget else limit - 1
