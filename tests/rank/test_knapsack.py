"""The search for the best choice: what it proves, and what it keeps where there is no room."""

import math
from fractions import Fraction
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.tables import made_table
from efsgd.rank.allocation import Candidate, allocate_within, knapsack
from efsgd.rank.allocation.allocate import as_integers, limit_of
from efsgd.rank.allocation.knapsack import solve
from tests.rank.knapsack_reference import (
    best_of_all,
    exact_totals,
    random_table,
    total_error,
    total_size,
)


def totals(layers: list[list[tuple[int, int]]], choice: list[int]) -> tuple[int, int]:
    """Size and error."""
    pairs = [layer[index] for layer, index in zip(layers, choice, strict=True)]
    return sum(size for _, size in pairs), sum(error for error, _ in pairs)


def textbook(layers: list[list[tuple[int, int]]], limit: int) -> tuple[int, int]:
    """Least size, and its least error: the least size of every total error, layer by layer."""
    sizes = {0: 0}
    for layer in layers:
        longer: dict[int, int] = {}
        for spent, size in sizes.items():
            for error, more in layer:
                if spent + error <= limit:
                    reached = longer.get(spent + error, size + more)
                    longer[spent + error] = min(reached, size + more)
        sizes = longer
    return min((size, error) for error, size in sizes.items())


@pytest.mark.parametrize("seed", range(10))
def test_forty_layers_of_integers_are_solved_as_the_textbook_does(seed: int) -> None:
    random = Random(seed)
    # Sizes of all sorts; or falling with the error, so that almost all of them are worth a look.
    layers = [[(e, random.randint(0, 500)) for e in random.sample(range(40), 8)] for _ in range(40)]
    if seed % 2:
        layers = [[(e, 40 * (40 - e) + s % 50) for e, s in layer] for layer in layers]
    limit = random.randint(sum(min(layer)[0] for layer in layers), 700)
    found = solve(layers, limit)
    assert found.is_optimal
    assert totals(layers, found.choice) == textbook(layers, limit)


def test_a_choice_said_to_be_optimal_is_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "FRONTIERS", (1, 2, 4))
    random = Random(3)
    proven = 0
    for _ in range(200):
        table = random_table(random, 5, 4)
        budget = total_error(table, [random.randrange(4) for _ in table])
        _, unit = as_integers([[candidate.error for candidate in layer] for layer in table])
        found = solve(in_integers(table), limit_of(budget, unit))
        if found.is_optimal:
            expected = best_of_all(table, budget)
            assert exact_totals(table, found.choice) == exact_totals(table, expected)
            proven += 1
    assert 20 < proven < 200


def test_with_no_room_the_result_is_still_no_worse_than_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(knapsack, "FRONTIERS", (1,))
    random = Random(4)
    worse = 0
    for _ in range(100):
        table = random_table(random, 5, 4)
        some = [random.randrange(4) for _ in table]
        best = best_of_all(table, total_error(table, some))
        # From the best choice, which cannot be made smaller, and from another.
        assert total_size(table, allocate_within(table, best)) == total_size(table, best)
        found = allocate_within(table, some)
        assert total_size(table, found) <= total_size(table, some)
        assert total_error(table, found) <= total_error(table, some)
        worse += total_size(table, found) > total_size(table, best)
    assert worse > 10


def in_integers(table: list[list[Candidate]]) -> list[list[tuple[int, int]]]:
    errors, _ = as_integers([[candidate.error for candidate in layer] for layer in table])
    sizes, _ = as_integers([[candidate.size for candidate in layer] for layer in table])
    return [list(zip(*rows, strict=True)) for rows in zip(errors, sizes, strict=True)]


def of_the_third(layers: list[list[tuple[int, int]]]) -> int:
    return sum(layer[2][0] for layer in layers)


@pytest.mark.parametrize("seed", range(5))
def test_a_network_of_200_layers_is_solved_to_the_optimum(seed: int) -> None:
    layers = in_integers(made_table(layers=200, candidates=16, seed=seed))
    limit = of_the_third(layers)
    found = solve(layers, limit)
    assert found.is_optimal
    assert totals(layers, found.choice)[1] <= limit


def test_of_too_many_partial_choices_the_most_promising_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = in_integers(made_table(layers=200, candidates=16, seed=1))
    limit = of_the_third(layers)
    sizes = []
    for most in (1, 8, 512):
        monkeypatch.setattr(knapsack, "FRONTIERS", (most,))
        sizes.append(totals(layers, solve(layers, limit).choice)[0])
    assert sizes[0] > sizes[1] == sizes[2]


def test_200_layers_on_straight_lines_are_solved_once_the_bound_is_met() -> None:
    random = Random(6)
    lengths = [random.randint(10, 10_000) for _ in range(200)]
    layers = [[(e, n - e) for e in random.choices(range(n), k=16)] for n in lengths]
    limit = of_the_third(layers)
    found = solve(layers, limit)
    assert found.is_optimal
    assert totals(layers, found.choice) == (sum(lengths) - limit, limit)


# Halfway between two floats: the nearest is 1, then 1 + 2^-51.
@example([1.0, 2.0**-53], 0)
@example([1 + 2.0**-52, 2.0**-53], -1)
@given(st.lists(st.floats(0, 1e308 / 8), min_size=1, max_size=8), st.integers(-2, 2))
def test_the_limit_allows_what_fsum_does(numbers: list[float], steps: int) -> None:
    budget = math.fsum(numbers)
    for _ in range(abs(steps)):
        budget = math.nextafter(budget, math.inf if steps > 0 else 0.0)
    (whole,), unit = as_integers([numbers])
    assert [multiple * unit for multiple in whole] == [Fraction(number) for number in numbers]
    assert (sum(whole) <= limit_of(budget, unit)) == (math.fsum(numbers) <= budget)
