"""Errors of the best approximations of mean matrices, exact and by power iteration."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efsgd.rank.approximation.spectra import exact_tails, power_tails
from efsgd.testing import Lockstep, lockstep
from efsgd.testing.gradients import gaussian
from efsgd.testing.strategies import matrix_shapes, seeds
from tests.simulation import bits

# Singular values are square roots of a float64 Gram matrix's eigenvalues, which are off by some
# eps times the largest: 1e-16 becomes 1e-8. Relative to the norm of the matrix.
BY_GRAM = 1e-7
# Products of at most 20 terms, QR decompositions and three iterations, in float64 and float32.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-4}

Matrices = dict[int, Tensor]


def best_tails(matrix: Tensor, rank: int) -> Tensor:
    """What the best approximations of rank 0 to r leave, from the definition."""
    values = torch.linalg.svdvals(matrix.double()).tolist()
    return torch.tensor(
        [math.hypot(*values[k:]) for k in range(rank + 1)], dtype=torch.float64, device="cpu"
    )


def mean_of(parts: Sequence[Matrices]) -> Matrices:
    return {i: torch.stack([own[i].double() for own in parts]).mean(0) for i in parts[0]}


def of_rank(rank: int, shape: tuple[int, int], *seed: int) -> Tensor:
    n, m = shape
    return gaussian((n, rank), *seed, 0) @ gaussian((rank, m), *seed, 1)


def powered(
    parts: Sequence[Matrices], ranks: dict[int, int], iterations: int = 2, sketch: int | None = None
) -> Lockstep[Matrices]:
    """`power_tails` on a worker for each part."""
    return lockstep(
        [power_tails(own, ranks, iterations=iterations, sketch=sketch) for own in parts]
    )


def assert_tails(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the norm of the matrix, which is the first of them."""
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected[0]


@st.composite
def split_matrices(draw: st.DrawFn) -> list[Matrices]:
    """Parts of one to four matrices, of both precisions, on one to five workers."""
    kinds = st.tuples(matrix_shapes(), st.sampled_from([torch.float64, torch.float32]))
    drawn = draw(st.lists(kinds, min_size=1, max_size=4))
    seed, workers = draw(seeds()), draw(st.integers(1, 5))
    return [
        {3 * i: gaussian(shape, seed, w, i).to(dtype) for i, (shape, dtype) in enumerate(drawn)}
        for w in range(workers)
    ]


def some_ranks(matrices: Matrices) -> dict[int, int]:
    """1, 2, 3, ... as far as the shapes allow."""
    return {i: min(*A.shape, 1 + place) for place, (i, A) in enumerate(matrices.items())}


def full_ranks(matrices: Matrices) -> dict[int, int]:
    return {i: min(A.shape) for i, A in matrices.items()}


# ---- exact_tails --------------------------------------------------------------------------------


@settings(max_examples=40)
@given(split_matrices(), st.booleans())
def test_exact_tails_are_those_of_the_singular_values(parts: list[Matrices], is_full: bool) -> None:
    means = {index: A.to(parts[0][index].dtype) for index, A in mean_of(parts).items()}
    ranks = full_ranks(means) if is_full else some_ranks(means)
    world_size = len(parts)
    done = lockstep([exact_tails(means, ranks, world_size, w) for w in range(world_size)])
    assert all(bits(found) == bits(done.results[0]) for found in done.results)
    assert [each.nbytes for each in done.trace] == [8 * sum(rank + 1 for rank in ranks.values())]
    for index, A in means.items():
        assert_tails(done.results[0][index], best_tails(A, ranks[index]), BY_GRAM)


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1e-30, torch.float32),
        (1e30, torch.float32),
        (1e-200, torch.float64),
        (1e200, torch.float64),
    ],
)
def test_exact_tails_neither_overflow_nor_vanish(scale: float, dtype: torch.dtype) -> None:
    A = (scale * gaussian((12, 10), 0)).to(dtype)
    (found,) = lockstep([exact_tails({0: A}, {0: 10}, 1, 0)]).results
    assert_tails(found[0] / scale, best_tails(A.double() / scale, 10), BY_GRAM)


@pytest.mark.parametrize("worker", range(3))
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_overflow_is_told_to_all_workers_and_raised_on_none(worker: int, value: float) -> None:
    means = {index: gaussian((6, 4), index) for index in range(3)}
    means[worker][2, 3] = value
    ranks = dict.fromkeys(means, 2)
    results = lockstep([exact_tails(means, ranks, 3, w) for w in range(3)]).results
    for found in results:
        finite = [bool(found[index].isfinite().all()) for index in means]
        assert finite == [index != worker for index in means]


# ---- power_tails --------------------------------------------------------------------------------


@settings(max_examples=40)
@given(split_matrices(), st.integers(1, 3))
def test_power_tails_are_never_below_the_best_and_fall_with_the_rank(
    parts: list[Matrices], iterations: int
) -> None:
    means = mean_of(parts)
    ranks = some_ranks(means)
    results = powered(parts, ranks, iterations).results
    assert all(bits(found) == bits(results[0]) for found in results)
    for index, A in means.items():
        found, best = results[0][index], best_tails(A, ranks[index])
        assert found.shape == best.shape
        slack = ROUNDING[parts[0][index].dtype] * best[0]
        assert (found >= best - slack).all()
        assert (found.diff() <= 0).all()
        # Nothing is lost or counted twice: at rank 0 all of the matrix is left.
        assert abs(found[0] - best[0]) <= slack


@settings(max_examples=40)
@given(split_matrices())
def test_power_tails_at_the_full_rank_are_those_of_the_singular_values(
    parts: list[Matrices],
) -> None:
    means = mean_of(parts)
    ranks = full_ranks(means)
    found = powered(parts, ranks, iterations=1).results[0]
    for index, A in means.items():
        assert found[index][-1] == 0.0
        rounding = ROUNDING[parts[0][index].dtype]
        assert_tails(found[index], best_tails(A, ranks[index]), rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("shape", [(12, 10), (5, 20), (20, 5)])
def test_matrices_of_no_higher_rank_are_found_exactly(
    dtype: torch.dtype, rank: int, shape: tuple[int, int]
) -> None:
    parts = [{0: of_rank(rank, shape, 7, 0).to(dtype)} for _ in range(3)]
    found = powered(parts, {0: 3}).results[0][0]
    expected = best_tails(mean_of(parts)[0], 3)
    assert_tails(found, expected, ROUNDING[dtype])
    assert found[rank] <= ROUNDING[dtype] * expected[0]


def test_iterations_approach_the_best_approximation() -> None:
    # Singular values 1, 1/2, 1/4, ...: each iteration gains a factor of 4 at least.
    left, right = (torch.linalg.qr(gaussian((16, 16), seed)).Q for seed in (1, 2))
    A = left @ torch.diag(0.5 ** torch.arange(16, dtype=torch.float64)) @ right
    best = best_tails(A, 3)
    errors = [
        float((powered([{0: A}], {0: 3}, iterations).results[0][0] - best).max())
        for iterations in (1, 2, 4, 20)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3
    assert errors[-1] <= ROUNDING[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_matrices_leave_nothing(dtype: torch.dtype) -> None:
    zeros = {0: torch.zeros(6, 4, dtype=dtype), 1: torch.zeros(1, 1, dtype=dtype)}
    found = powered([zeros, zeros], {0: 2, 1: 1}, sketch=3).results[0]
    exact = lockstep([exact_tails(zeros, {0: 2, 1: 1}, 2, w) for w in range(2)]).results[0]
    for tails in (found, exact):
        assert {i: own.tolist() for i, own in tails.items()} == {0: [0.0] * 3, 1: [0.0] * 2}


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_power_tails_of_float32_neither_overflow_nor_vanish(scale: float) -> None:
    parts = [{0: (scale * gaussian((12, 10), worker)).float()} for worker in range(2)]
    found = powered(parts, {0: 10}).results[0][0]
    assert_tails(found, best_tails(mean_of(parts)[0], 10), ROUNDING[torch.float32])


def test_parts_may_be_large_where_the_mean_is_small() -> None:
    large, small = 1e4 * gaussian((12, 10), 0), of_rank(2, (12, 10), 1)
    parts = [{0: small + large}, {0: small - large}]
    found = powered(parts, {0: 4}).results[0][0]
    # What cancels is 1e4 times as large as what is left, which costs four digits.
    assert_tails(found, best_tails(small, 4), 1e4 * ROUNDING[torch.float64])


@pytest.mark.parametrize("value", [math.inf, math.nan, 3e38])
def test_an_overflow_of_power_iteration_is_told_and_not_raised(value: float) -> None:
    parts = [{0: gaussian((12, 10), w).float(), 1: gaussian((6, 6), w).float()} for w in range(2)]
    parts[1][1] = torch.full((6, 6), value)
    found = powered(parts, {0: 3, 1: 3}).results[0]
    assert found[0].isfinite().all()
    assert not found[1].isfinite().all()


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("sketch", [None, 50, 4096])
def test_what_power_iteration_sends_is_as_documented(iterations: int, sketch: int | None) -> None:
    parts = [{0: gaussian((12, 10), w).float(), 5: gaussian((6, 20), w).float()} for w in range(2)]
    trace = powered(parts, {0: 2, 5: 3}, iterations, sketch).trace
    factors = iterations * (2 * (12 + 10) + 3 * (6 + 20))
    remainders = sum(min(120, 120 if sketch is None else sketch) for _ in parts[0])
    assert [each.kind for each in trace] == ["AllReduceMean"] * (2 * iterations + 1)
    assert sum(each.nbytes for each in trace) == 4 * (factors + remainders)


def test_a_sketch_stands_for_what_is_left() -> None:
    A = gaussian((100, 80), 3)
    exact = powered([{0: A}], {0: 4}).results[0][0]
    found = powered([{0: A}], {0: 4}, sketch=1000).results[0][0]
    # Standard deviation 1 / √(2·1000) = 2.2 %; at rank 0 no factor hides what is left.
    assert bits(found) != bits(exact)
    assert (found / exact - 1).abs().max() <= 4 * 0.023
