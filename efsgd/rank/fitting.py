"""Which values fit into a limit of what they cost together."""

from bisect import bisect_right
from collections.abc import Callable, Sequence

from efsgd.rank.layers import Value


def largest_within(
    values: Sequence[Value],
    table: Sequence[Sequence[float]],
    total: Callable[[Sequence[Value]], float],
    limit: float,
) -> list[Value] | None:
    """Chooses a value for each layer; None where not one value is within the limit for all.

    The last of `values`, which ascend in cost, whose total is within the limit for all layers. Then
    single layers get the next value that costs them anything else, in order of what it costs more,
    the first of equals first, while the limit lasts. `table` has what each value costs each layer,
    a row for each; `total` what chosen values cost together, about the sum of the table's.
    """
    last_first = reversed(range(len(values)))
    uniform = next((k for k in last_first if total([values[k]] * len(table)) <= limit), None)
    if uniform is None:
        return None
    raises = []
    for layer, row in enumerate(table):
        higher = [k for k in range(uniform + 1, len(row)) if row[k] != row[uniform]]
        raises += [(row[k] - row[uniform], layer, k) for k in higher[:1]]
    raises.sort()

    def with_first(count: int) -> list[Value]:
        chosen = [values[uniform]] * len(table)
        for _, layer, k in raises[:count]:
            chosen[layer] = values[k]
        return chosen

    counts = range(len(raises) + 1)
    return with_first(bisect_right(counts, limit, key=lambda n: total(with_first(n))) - 1)
