"""What each layer may cost: the least total size whose total error stays within a budget.

Every layer has candidates, such as ranks, densities or bits, of which each has a size, such as
bytes or milliseconds, and an error. One is chosen of every layer. Only numbers are asked for, so
any compressor's table will do.

Source: Alimohammadi, Markov, Frantar, Alistarh: "L-GreCo", MLSys 2024, arXiv 2210.17357, which
allows the error of the uniform choice, and looks for a smaller one on a grid of errors, all of them
rounded up. On the grid the uniform choice may itself exceed the budget. Here nothing is
rounded, so the result is also the same on every machine.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from efsgd.rank.allocation.knapsack import solve


def as_integers(rows: Sequence[Sequence[float]]) -> tuple[list[list[int]], Fraction]:
    """The numbers as multiples of the largest unit there is for all of them.

    Args:
        rows: finite numbers.

    Returns:
        The multiples, and the unit.

    Example:
        >>> from efsgd.rank.allocation.allocate import as_integers
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
        >>> from efsgd.rank.allocation.allocate import limit_of
        >>> from fractions import Fraction
        >>> limit_of(0.75, Fraction(1, 4)), limit_of(0.3, Fraction(1, 4))
        (3, 1)
    """
    halfway = Fraction(budget) + Fraction(math.ulp(budget)) / 2
    limit = math.floor(halfway / unit)
    return limit if float(limit * unit) <= budget else limit - 1


@dataclass(frozen=True)
class Candidate:
    """One way to send a layer.

    Attributes:
        size: what it costs: bytes, or milliseconds, or anything that adds up over the layers.
        error: what it loses: a norm, or anything that adds up over the layers.
    """

    size: float
    error: float


#: The candidates of every layer, in any order.
Table = Sequence[Sequence[Candidate]]


def allocate(table: Table, budget: float) -> list[int]:
    """Chooses a candidate of every layer: least total size, with a total error in the budget.

    Of choices of the same total size it is one of least total error, and of those the one with
    the lowest index in the first layer in which they differ. Totals are compared without rounding;
    what must be within the budget is their nearest float, which `math.fsum` gives.

    The choice is the best there is, unless the table is hard: hundreds of layers, each with sizes
    that are almost a linear function of the errors. Partial choices are then left out, so that a
    better one may be missed; the result is within the budget all the same.

    Args:
        table: the candidates of every layer.
        budget: most total error.

    Returns:
        The index of the chosen candidate, for each layer.

    Raises:
        ValueError: a layer has no candidates, a number is negative or not finite, or no choice
            is within the budget.

    Example:
        >>> from efsgd.rank.allocation import Candidate, allocate
        >>> small = [Candidate(size=1, error=4), Candidate(size=2, error=1)]
        >>> large = [Candidate(size=10, error=4), Candidate(size=20, error=1)]
        >>> allocate([small, large], budget=5)
        [1, 0]
    """
    errors, sizes = _validated(table)
    if not _is_number(budget):
        raise ValueError(f"Invalid budget: {budget!r}. Must be a finite number of at least 0.")
    least = math.fsum(min(row) for row in errors)
    if least > budget:
        raise ValueError(
            f"Invalid budget: {budget!r}. No choice has a total error below {least!r}; "
            "raise the budget, or add candidates of less error."
        )
    return _solved(errors, sizes, float(budget))


def allocate_within(table: Table, reference: Sequence[int], tolerance: float = 1.0) -> list[int]:
    """Chooses a candidate of every layer: least total size, with the error of a known choice.

    The budget of `allocate` is the total error of the reference, the same rank everywhere for
    example, times the tolerance. With a tolerance of at least 1 the result has no more total size
    than the reference, whatever the table. Totals are those of `math.fsum`.

    Args:
        table: the candidates of every layer.
        reference: the index of a candidate, for each layer.
        tolerance: of the total error, a factor. Where it is below 1 and no choice is within the
            budget, the result is the choice of least error.

    Returns:
        The index of the chosen candidate, for each layer.

    Raises:
        ValueError: a layer has no candidates, a number is negative or not finite, or the
            reference does not name one candidate of each layer.

    Example:
        >>> from efsgd.rank.allocation import Candidate, allocate_within
        >>> small = [Candidate(size=rank, error=4 / rank) for rank in (1, 2, 3, 4)]
        >>> large = [Candidate(size=100 * rank, error=2 / rank) for rank in (1, 2, 3, 4)]
        >>> allocate_within([small, large], reference=[1, 1])  # an error of 3, a size of 202
        [3, 0]
    """
    errors, sizes = _validated(table)
    _validate_reference(table, reference)
    if not _is_number(tolerance):
        raise ValueError(
            f"Invalid tolerance: {tolerance!r}. Must be a finite number of at least 0; "
            "1 allows the reference's error."
        )
    total = math.fsum(row[index] for row, index in zip(errors, reference, strict=True))
    budget = float(tolerance) * total
    least = math.fsum(min(row) for row in errors)
    known = reference if total <= budget else None
    return _solved(errors, sizes, max(budget, least), known)


def _solved(
    errors: list[list[float]],
    sizes: list[list[float]],
    budget: float,
    known: Sequence[int] | None = None,
) -> list[int]:
    """Solved in integers; the budget is at least the least total error, and that of `known`."""
    whole_errors, unit = as_integers(errors)
    whole_sizes, _ = as_integers(sizes)
    # An infinite budget is no more than that of all errors.
    limit = limit_of(min(budget, math.fsum(max(row) for row in errors)), unit)
    layers = [list(zip(*rows, strict=True)) for rows in zip(whole_errors, whole_sizes, strict=True)]
    return solve(layers, limit, known).choice


def _validated(table: Table) -> tuple[list[list[float]], list[list[float]]]:
    """The errors and the sizes of every layer's candidates."""
    if not table:
        raise ValueError(f"Invalid table: {table!r}. Must hold the candidates of at least 1 layer.")
    for index, layer in enumerate(table):
        if not layer:
            raise ValueError(
                f"Invalid table: layer {index} has no candidates. Must have at least 1; "
                "leave out a layer of which there is nothing to choose."
            )
        for position, candidate in enumerate(layer):
            if not _is_candidate(candidate):
                raise ValueError(
                    f"Invalid candidate {position} of layer {index}: {candidate!r}. Must be a "
                    "Candidate whose size and error are finite numbers of at least 0; leave out "
                    "what cannot be chosen."
                )
    errors = [[float(candidate.error) for candidate in layer] for layer in table]
    sizes = [[float(candidate.size) for candidate in layer] for layer in table]
    for rows, name in ((errors, "error"), (sizes, "size")):
        if not _is_summable([max(row) for row in rows]):
            raise ValueError(
                f"Invalid table: the largest total {name} must be below {sys.float_info.max!r}; "
                f"divide every {name} by the same number."
            )
    return errors, sizes


def _validate_reference(table: Table, reference: Sequence[int]) -> None:
    if len(reference) != len(table):
        raise ValueError(
            f"Invalid reference: {reference!r}. Must have an index for each of the {len(table)} "
            f"layers of the table, but has {len(reference)}."
        )
    for index, (layer, chosen) in enumerate(zip(table, reference, strict=True)):
        if not _is_index(chosen, len(layer)):
            raise ValueError(
                f"Invalid reference for layer {index}: {chosen!r}. "
                f"Must be an integer from 0 to {len(layer) - 1}, the index of a candidate."
            )


def _is_candidate(value: object) -> bool:
    return isinstance(value, Candidate) and _is_number(value.size) and _is_number(value.error)


def _is_number(value: object) -> bool:
    """Whether it is finite and at least 0, also as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= sys.float_info.max


def _is_summable(numbers: list[float]) -> bool:
    try:
        return math.fsum(numbers) < sys.float_info.max
    except OverflowError:
        return False


def _is_index(value: object, length: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < length
