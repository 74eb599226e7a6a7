"""The largest value that all can have within a budget, and one more for those it costs least."""

from bisect import bisect_right
from collections.abc import Callable, Sequence

from efsgd.rank.base import Value

__all__ = ["largest_within"]


def largest_within(
    values: Sequence[Value],
    table: Sequence[Sequence[float]],
    total: Callable[[Sequence[Value]], float],
    limit: float,
) -> list[Value] | None:
    """Chooses a value for each layer.

    The last of `values` whose total is within the limit, for all alike. Then single layers get the
    next value that costs them anything else, in order of what it costs more, the first of equals
    first, while the limit lasts.

    Args:
        values: in order of ascending cost.
        table: what each value costs each layer, a row for each.
        total: what chosen values cost together: about the sum of the table's.
        limit: of the total.

    Returns:
        By layer; None where not one value is within the limit for all.

    Example:
        >>> from efsgd.rank.allocation.largest import largest_within
        >>> table = [[1, 2, 3], [10, 20, 30]]
        >>> def total(chosen):
        ...     return sum(row[value - 1] for row, value in zip(table, chosen))
        >>> largest_within([1, 2, 3], table, total, limit=23), total([3, 2])
        ([3, 2], 23)
    """
    last_first = range(len(values) - 1, -1, -1)
    uniform = next((k for k in last_first if total([values[k]] * len(table)) <= limit), None)
    if uniform is None:
        return None
    raises = sorted(_raises(table, uniform))

    def with_first(count: int) -> list[Value]:
        chosen = [values[uniform]] * len(table)
        for _, layer, k in raises[:count]:
            chosen[layer] = values[k]
        return chosen

    counts = range(len(raises) + 1)
    return with_first(bisect_right(counts, limit, key=lambda n: total(with_first(n))) - 1)


def _raises(table: Sequence[Sequence[float]], uniform: int) -> list[tuple[float, int, int]]:
    """What the next value costs more, of which layer, and which value it is."""
    found = []
    for layer, row in enumerate(table):
        for k in range(uniform + 1, len(row)):
            if row[k] != row[uniform]:
                found.append((row[k] - row[uniform], layer, k))
                break
    return found
