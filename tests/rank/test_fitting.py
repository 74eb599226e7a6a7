"""The largest value for all, and one more for some: checked against what it says."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from efsgd.rank.fitting import largest_within

tables = st.lists(st.lists(st.integers(0, 20), min_size=4, max_size=4), min_size=1, max_size=4)


@given(table=tables, limit=st.integers(0, 90))
def test_the_largest_uniform_value_within_the_limit_is_chosen_and_the_cheapest_raised(
    table: list[list[int]], limit: int
) -> None:
    table = [sorted(row) for row in table]
    values = (1, 2, 3, 4)

    def total(chosen: Any) -> int:
        return sum(row[value - 1] for row, value in zip(table, chosen, strict=True))

    chosen = largest_within(values, table, total, limit)
    uniform = [value for value in values if total([value] * len(table)) <= limit]
    if chosen is None:
        assert not uniform
        return
    first = uniform[-1]
    assert total(chosen) <= limit
    raises = {}
    for layer, row in enumerate(table):
        higher = [value for value in values[first:] if row[value - 1] > row[first - 1]]
        assert chosen[layer] in (first, *higher[:1])
        if higher:
            raises[layer] = row[higher[0] - 1] - row[first - 1]
    taken = [layer for layer in raises if chosen[layer] != first]
    left = [layer for layer in raises if chosen[layer] == first]
    if left:  # the cheapest of the others would exceed the limit
        cheapest = min(left, key=lambda layer: (raises[layer], layer))
        assert total(chosen) + raises[cheapest] > limit
        assert all((raises[layer], layer) < (raises[cheapest], cheapest) for layer in taken)


def test_the_total_counts_and_not_the_sum() -> None:
    table = [[0, 1], [0, 2], [0, 3]]

    def total(chosen: Any) -> float:  # two raised layers cost one more together
        raised = [layer for layer, value in enumerate(chosen) if value == 2]
        return sum(table[layer][1] for layer in raised) + (1 if len(raised) > 1 else 0)

    assert largest_within((1, 2), table, total, 3) == [2, 1, 1]
