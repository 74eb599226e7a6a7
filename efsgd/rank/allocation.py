"""What each layer may cost: the least total size whose total error stays within a budget.

Every layer has candidates, such as ranks, densities or bits. Each has a size, such as bytes or
milliseconds, and an error. One is chosen for every layer. Only numbers are needed, so any
compressor's table will do.

Source: Alimohammadi, Markov, Frantar, Alistarh: "L-GreCo", MLSys 2024, arXiv 2210.17357: dynamic
programming over a grid of errors, within the error of the uniform choice. Here the grid only says
which partial choices are kept; totals are integers, and never rounded.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import NamedTuple

from efsgd.checks import is_integer, is_number, require_number

#: Cells of the grids, one after the other: the choice of the first limits the search of the second.
CELLS = (32, 256)


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
    """Chooses a candidate for every layer: little total size, with a total error in the budget.

    The budget is a hard limit: the total error, summed without rounding and then rounded to the
    nearest float as `math.fsum` does, never exceeds it.

    The size is the least there is, with the least error of that size and the lowest indices of
    those, unless more than 256 partial choices have to be remembered. Then one is kept in each cell
    of a grid of errors, and a slightly smaller size may be missed: usually less than 0.1 %.

    Args:
        table: the candidates of every layer.
        budget: the largest total error.

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
    require_number("budget", budget)
    least = math.fsum(min(row) for row in errors)
    if least > budget:
        raise ValueError(
            f"Invalid budget: {budget!r}. No choice has a total error below {least!r}; "
            "raise the budget, or add candidates of less error."
        )
    return _solved(errors, sizes, float(budget))


def allocate_within(table: Table, reference: Sequence[int], tolerance: float = 1.0) -> list[int]:
    """Chooses a candidate for every layer: little total size, with the error of a known choice.

    The budget of `allocate` is the total error of the reference, the same rank everywhere for
    example, times the tolerance. With a tolerance of at least 1 the result has no more total size
    than the reference, whatever the table. Totals are those of `math.fsum`.

    Args:
        table: the candidates of every layer.
        reference: the index of a candidate, for each layer.
        tolerance: a factor of the total error. Where it is below 1 and no choice is within the
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
    if len(reference) != len(table):
        raise ValueError(
            f"Invalid reference: {reference!r}. Must have an index for each of the {len(table)} "
            f"layers of the table, but has {len(reference)}."
        )
    for index, (layer, chosen) in enumerate(zip(table, reference, strict=True)):
        if not is_integer(chosen, 0, len(layer) - 1):
            raise ValueError(
                f"Invalid reference for layer {index}: {chosen!r}. "
                f"Must be an integer from 0 to {len(layer) - 1}, the index of a candidate."
            )
    require_number("tolerance", tolerance, remedy="1 allows the reference's error.")
    total = math.fsum(row[index] for row, index in zip(errors, reference, strict=True))
    budget = float(tolerance) * total
    least = math.fsum(min(row) for row in errors)
    known = reference if total <= budget else None
    return _solved(errors, sizes, max(budget, least), known)


class State(NamedTuple):
    """A candidate in integers, or totals of one candidate from each of some layers."""

    error: int
    size: int
    excess: int  # how much more it costs than the cheapest choice, where error has a price
    code: int  # which candidates they are: a number whose digits are their indices


def _solved(
    errors: list[list[float]],
    sizes: list[list[float]],
    budget: float,
    known: Sequence[int] | None = None,
) -> list[int]:
    """The choice; the budget is at least the least total error, and that of `known`."""
    whole_errors, denominator = _as_integers(errors)
    whole_sizes, _ = _as_integers(sizes)
    # An infinite budget is no more than that of all errors.
    budget = min(budget, math.fsum(max(row) for row in errors))
    # The largest numerator whose nearest float, as `math.fsum` gives it, is within the budget.
    limit = math.floor((Fraction(budget) + Fraction(math.ulp(budget)) / 2) * denominator)
    if float(Fraction(limit, denominator)) > budget:
        limit -= 1
    digits = max(map(len, errors)).bit_length()
    places = [digits * place for place in reversed(range(len(errors)))]
    layers = [
        [State(e, s, 0, item << place) for item, (e, s) in enumerate(zip(*rows, strict=True))]
        for rows, place in zip(zip(whole_errors, whole_sizes, strict=True), places, strict=True)
    ]
    best = _total([min(layer, key=_preference) for layer in layers])
    if best.error > limit:
        layers, best, price = _priced(layers, limit, best)
        if known is not None:
            chosen = [layer[item] for layer, item in zip(layers, known, strict=True)]
            best = min(best, _total(chosen), key=_preference)
        for cells in CELLS:
            # A choice of more excess is beyond the limit, or no smaller than the best one.
            room = best.excess + price * (limit - best.error)
            best = min([best, *_sweep(layers, limit, room, cells)], key=_preference)
    return [best.code >> place & ((1 << digits) - 1) for place in places]


def _priced(
    layers: list[list[State]], limit: int, above: State
) -> tuple[list[list[State]], State, int]:
    """The candidates with their excess; a choice within the limit without any; the price of error.

    At that price (Lagrange's multiplier) no choice within the limit costs less than the one found.
    `above` is the choice of least size, which is beyond the limit.
    """
    below = _total([min(layer) for layer in layers])
    while True:
        cost = partial(_cost, above.error - below.error, below.size - above.size)
        cheapest = [min(sorted(layer), key=cost) for layer in layers]
        found = _total(cheapest)
        if cost(found) == cost(below):
            break
        if found.error <= limit:
            below = found
        else:
            above = found
    priced = [
        [state._replace(excess=cost(state) - cost(least)) for state in layer]
        for layer, least in zip(layers, cheapest, strict=True)
    ]
    return priced, below, below.size - above.size


def _sweep(layers: list[list[State]], limit: int, room: int, cells: int) -> list[State]:
    """Choices within the limit; after each layer at most one is kept in a cell of errors."""
    kept = [sorted(state for state in layer if state.excess <= room) for layer in layers]
    # The widest range of errors first: the last layers can then make up for little.
    kept.sort(key=lambda layer: layer[0].error - layer[-1].error)
    rest = sum(layer[0].error for layer in kept)
    states = [State(0, 0, 0, 0)]
    for layer in kept:
        rest -= layer[0].error
        sums = sorted(
            (a + error, b + size, c + excess, d + code)
            for a, b, c, d in layer
            for error, size, excess, code in states
            if c + excess <= room and a + error + rest <= limit
        )
        states = []
        for each in sums:
            if not states or each[1] < states[-1].size:
                states.append(State(*each))
        if len(states) > cells:
            first, width = states[0].error, states[-1].error - states[0].error + 1
            grid: dict[int, State] = {}
            for state in states:
                cell = (state.error - first) * cells // width
                if cell not in grid or state.excess <= grid[cell].excess:
                    grid[cell] = state
            states = list(grid.values())
    return states


def _total(states: Sequence[State]) -> State:
    return State(*map(sum, zip(*states, strict=True)))


def _cost(size_price: int, error_price: int, state: State) -> int:
    return size_price * state.size + error_price * state.error


def _preference(state: State) -> tuple[int, int, int]:
    return state.size, state.error, state.code


def _as_integers(rows: list[list[float]]) -> tuple[list[list[int]], int]:
    """The numbers times the least denominator that all of them share, and the denominator."""
    ratios = [[number.as_integer_ratio() for number in row] for row in rows]
    shared = max(below for row in ratios for _, below in row)  # powers of two
    return [[above * (shared // below) for above, below in row] for row in ratios], shared


def _validated(table: Table) -> tuple[list[list[float]], list[list[float]]]:
    """The errors and the sizes of every layer's candidates."""
    if not table:
        raise ValueError(f"Invalid table: {table!r}. Must hold the candidates of at least 1 layer.")
    for index, layer in enumerate(table):
        if not layer:
            raise ValueError(
                f"Invalid table: layer {index} has no candidates. Must have at least 1; leave out "
                "layers without a choice."
            )
        for position, candidate in enumerate(layer):
            sound = isinstance(candidate, Candidate)
            if not sound or not all(map(_is_finite, (candidate.size, candidate.error))):
                raise ValueError(
                    f"Invalid candidate {position} of layer {index}: {candidate!r}. Must be a "
                    "Candidate whose size and error are finite numbers of at least 0; leave out "
                    "what cannot be chosen."
                )
    errors = [[float(candidate.error) for candidate in layer] for layer in table]
    sizes = [[float(candidate.size) for candidate in layer] for layer in table]
    for rows, name in ((errors, "error"), (sizes, "size")):
        if sum(Fraction(max(row)) for row in rows) >= Fraction(sys.float_info.max):
            raise ValueError(
                f"Invalid table: the largest total {name} must be below {sys.float_info.max!r}; "
                f"divide every {name} by the same number."
            )
    return errors, sizes


def _is_finite(value: object) -> bool:
    """Whether it is a number of at least 0 that a float can hold."""
    return is_number(value) and 0 <= value <= sys.float_info.max  # type: ignore[operator]
