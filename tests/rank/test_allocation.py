"""What each layer may cost: guarantees of the choice, whatever the table, and its errors."""

import math
import re
import statistics
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.tables import made_table
from efsgd.rank import Candidate, allocate, allocate_within, allocation
from tests.rank.knapsack_reference import (
    best_of_all,
    exact_totals,
    random_table,
    textbook,
    total_error,
    total_size,
)

NUMBERS = st.floats(0, 1e6) | st.floats(0, 1e300) | st.sampled_from([0.1, 0.2, 0.3, 5e-324])
SMALL = st.integers(0, 5)
INSTANCES = 2000


def tables(numbers: Any, layers: int) -> Any:
    candidates = st.builds(Candidate, size=numbers, error=numbers)
    return st.lists(st.lists(candidates, min_size=1, max_size=4), min_size=1, max_size=layers)


def a_choice(data: st.DataObject, table: Sequence[Sequence[Candidate]]) -> list[int]:
    return [data.draw(st.integers(0, len(layer) - 1)) for layer in table]


@given(st.data())
def test_small_integers_with_many_ties_give_the_choice_of_brute_force(data: st.DataObject) -> None:
    table = data.draw(tables(SMALL, layers=5))
    budget = total_error(table, a_choice(data, table))
    assert allocate(table, budget) == best_of_all(table, budget)


@given(st.data())
def test_any_floats_give_the_totals_of_brute_force(data: st.DataObject) -> None:
    table = data.draw(tables(NUMBERS, layers=4))
    budget = total_error(table, a_choice(data, table))
    # Just below or above what a choice has, unless it has the least.
    budget = data.draw(st.sampled_from([budget, math.nextafter(budget, 0), budget * 1.25]))
    least = math.fsum(min(candidate.error for candidate in layer) for layer in table)
    budget = max(budget, least)
    found, expected = allocate(table, budget), best_of_all(table, budget)
    assert exact_totals(table, found) == exact_totals(table, expected)


def test_the_result_is_never_worse_than_the_uniform_choice() -> None:
    random = Random(0)
    smaller = 0
    for _ in range(INSTANCES):
        table = random_table(random, random.randint(1, 12), candidates := random.randint(1, 6))
        uniform = [random.randrange(candidates)] * len(table)
        found = allocate_within(table, uniform)
        assert total_size(table, found) <= total_size(table, uniform)
        assert total_error(table, found) <= total_error(table, uniform)
        smaller += total_size(table, found) < total_size(table, uniform)
    assert smaller > INSTANCES / 2


@given(st.data(), st.floats(0, 3))
def test_the_tolerance_is_a_factor_of_the_errors(data: st.DataObject, tolerance: float) -> None:
    table = data.draw(tables(SMALL, layers=4))
    reference = a_choice(data, table)
    budget = tolerance * total_error(table, reference)
    least = sum(min(candidate.error for candidate in layer) for layer in table)
    # Where nothing is within the budget it is the choice of least error.
    expected = best_of_all(table, max(budget, least))
    assert allocate_within(table, reference, tolerance) == expected


def test_an_uniform_choice_that_a_grid_of_rounded_errors_excludes_is_found() -> None:
    table = [[Candidate(1, 10.0), Candidate(2, 1.0), Candidate(3, 0.5)] for _ in range(3)]
    budget, buckets = 3.0, 10_000
    assert sum(math.ceil(layer[1].error / (budget / buckets)) for layer in table) > buckets
    assert allocate_within(table, [1, 1, 1]) == [1, 1, 1]


def test_the_order_of_layers_does_not_change_the_totals() -> None:
    random = Random(1)
    for _ in range(100):
        table = random_table(random, 10, 5)
        budget = total_error(table, [random.randrange(5) for _ in table])
        mixed = random.sample(table, len(table))
        totals = exact_totals(table, allocate(table, budget))
        assert exact_totals(mixed, allocate(mixed, budget)) == totals


@pytest.mark.parametrize("factor", [2.0**-70, 0.5, 2.0**70])
def test_powers_of_two_as_units_make_no_difference(factor: float) -> None:
    random = Random(2)
    for _ in range(50):
        table = random_table(random, 10, 5)
        budget = total_error(table, [random.randrange(5) for _ in table])
        expected = allocate(table, budget)
        sizes = [[Candidate(c.size * factor, c.error) for c in layer] for layer in table]
        assert allocate(sizes, budget) == expected
        errors = [[Candidate(c.size, c.error * factor) for c in layer] for layer in table]
        assert allocate(errors, budget * factor) == expected


@pytest.mark.parametrize("layers", [60, 200])
def test_a_network_of_many_layers_is_made_smaller_with_no_more_error(layers: int) -> None:
    table = made_table(layers=layers, candidates=16, seed=0)
    uniform = [3] * len(table)
    found = allocate_within(table, uniform)
    assert total_size(table, found) < 0.5 * total_size(table, uniform)
    assert total_error(table, found) <= total_error(table, uniform)


def unrelated(random: Random) -> list[list[Candidate]]:
    return [
        [Candidate(random.randint(0, 500), error) for error in random.sample(range(40), 8)]
        for _ in range(40)
    ]


def straight(random: Random) -> list[list[Candidate]]:
    """Sizes that fall almost linearly with the errors: all partial choices are about as good."""
    return [
        [Candidate(40 * (40 - c.error) + c.size % 50, c.error) for c in layer]
        for layer in unrelated(random)
    ]


def of_a_network(random: Random) -> list[list[Candidate]]:
    """Errors of decaying spectra, rounded to integers."""
    table = made_table(layers=60, candidates=8, seed=random.randrange(1000))
    return [[Candidate(c.size, round(100 * c.error)) for c in layer] for layer in table]


@pytest.mark.parametrize("make", [unrelated, straight, of_a_network])
def test_of_more_partial_choices_than_are_kept_the_result_is_nearly_the_best(make: Any) -> None:
    excess = []
    for seed in range(10):
        table = make(Random(seed))
        reference = [3] * len(table)
        budget = total_error(table, reference)
        found = allocate(table, budget)
        assert total_error(table, found) <= budget
        excess.append(total_size(table, found) / textbook(table, budget) - 1)
    assert min(excess) >= 0
    assert statistics.median(excess) <= 0.0005
    assert max(excess) <= 0.002


@pytest.mark.parametrize("cells", [(1,), (2, 4)])
def test_however_few_partial_choices_are_kept_the_result_is_no_worse_than_the_reference(
    cells: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "CELLS", cells)
    random, worse = Random(4), 0
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
    assert worse > 0


# Halfway between two floats: the nearest is 1, then 1 + 2^-51.
@example([1.0, 2.0**-53], 0)
@example([1 + 2.0**-52, 2.0**-53], -1)
@given(st.lists(st.floats(0, 1e308 / 8), min_size=1, max_size=8), st.integers(-2, 2))
def test_the_budget_allows_what_fsum_does(numbers: list[float], steps: int) -> None:
    budget = math.fsum(numbers)
    for _ in range(abs(steps)):
        budget = math.nextafter(budget, math.inf if steps > 0 else 0.0)
    rest = math.fsum(numbers[1:])
    if rest <= budget:
        first = [Candidate(2, 0.0), Candidate(1, numbers[0])]
        found = allocate([first, *([Candidate(1, number)] for number in numbers[1:])], budget)
        assert found[0] == (1 if math.fsum(numbers) <= budget else 0)


def test_an_infinite_product_of_tolerance_and_error_is_no_limit() -> None:
    table = [[Candidate(2, 1e300), Candidate(1, 1e307)]]
    assert allocate_within(table, [0], tolerance=1e300) == [1]


GOOD = [Candidate(1, 2.0), Candidate(2, 1.0)]
WITH_NAN = [GOOD, [Candidate(1, 1.0), Candidate(1, math.nan)]]
MUST = "Must be a Candidate whose size and error are finite numbers of at least 0; leave out what"
MUST_BE_FINITE = "Must be a finite number of at least 0"


@pytest.mark.parametrize(
    ("table", "budget", "message"),
    [
        ([], 1.0, "Invalid table: []. Must hold the candidates of at least 1 layer."),
        ([GOOD, []], 1.0, "Invalid table: layer 1 has no candidates. Must have at least 1; leave"),
        (WITH_NAN, 1.0, f"Invalid candidate 1 of layer 1: Candidate(size=1, error=nan). {MUST}"),
        ([[Candidate(math.inf, 0)]], 1.0, f"layer 0: Candidate(size=inf, error=0). {MUST}"),
        ([[Candidate(1, math.inf)]], 1.0, f"layer 0: Candidate(size=1, error=inf). {MUST}"),
        ([[Candidate(-1, 0)]], 1.0, f"layer 0: Candidate(size=-1, error=0). {MUST}"),
        ([[Candidate(0, -0.5)]], 1.0, f"layer 0: Candidate(size=0, error=-0.5). {MUST}"),
        ([[Candidate(True, 0)]], 1.0, f"layer 0: Candidate(size=True, error=0). {MUST}"),
        ([[Candidate(10**400, 0)]], 1.0, MUST),
        ([[(1, 2.0)]], 1.0, f"Invalid candidate 0 of layer 0: (1, 2.0). {MUST}"),
        ([[Candidate(1, 1e308)]] * 2, 1.0, "the largest total error must be below 1.797"),
        ([[Candidate(1e308, 1)]] * 2, 9.0, "the largest total size must be below 1.797"),
        ([GOOD], math.nan, f"Invalid budget: nan. {MUST_BE_FINITE}"),
        ([GOOD], math.inf, f"Invalid budget: inf. {MUST_BE_FINITE}"),
        ([GOOD], -1.0, f"Invalid budget: -1.0. {MUST_BE_FINITE}"),
        ([GOOD], "1", f"Invalid budget: '1'. {MUST_BE_FINITE}"),
        ([GOOD, GOOD], 1.5, "Invalid budget: 1.5. No choice has a total error below 2.0; raise"),
    ],
)
def test_tables_and_budgets_that_mean_nothing_are_refused(
    table: Any, budget: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        allocate(table, budget)


INDEX = "Must be an integer from 0 to 1, the index of a candidate."


@pytest.mark.parametrize(
    ("reference", "tolerance", "message"),
    [
        ([0], 1.0, "Invalid reference: [0]. Must have an index for each of the 2 layers of the"),
        ([0, 2], 1.0, f"Invalid reference for layer 1: 2. {INDEX}"),
        ([-1, 0], 1.0, f"Invalid reference for layer 0: -1. {INDEX}"),
        ([0, 1.0], 1.0, f"Invalid reference for layer 1: 1.0. {INDEX}"),
        ([True, 0], 1.0, f"Invalid reference for layer 0: True. {INDEX}"),
        ([0, 0], math.nan, f"Invalid tolerance: nan. {MUST_BE_FINITE}"),
        ([0, 0], math.inf, f"Invalid tolerance: inf. {MUST_BE_FINITE}"),
        ([0, 0], -0.1, f"Invalid tolerance: -0.1. {MUST_BE_FINITE}"),
    ],
)
def test_references_and_tolerances_that_mean_nothing_are_refused(
    reference: Any, tolerance: float, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        allocate_within([GOOD, GOOD], reference, tolerance)
    with pytest.raises(ValueError, match="Invalid table"):
        allocate_within([], reference, tolerance)
