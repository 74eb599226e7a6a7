"""Factors of another rank: the subspace that counts most is kept, and what is new counts least."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from efsgd.algorithms.low_rank.factors import resized
from efsgd.testing.gradients import gaussian
from efsgd.testing.strategies import seeds

# Some dozen operations in float64, 2e-16 each, beside the largest singular value.
ROUNDING = 1e-13


def factor(m: int, r: int, seed: int) -> Tensor:
    """Columns of very different lengths, in no order, float64."""
    scales = 10.0 ** (2 * gaussian((r,), seed, 1)).clamp(-3, 3)
    return gaussian((m, r), seed) * scales


def drawn(m: int, columns: int, seed: int = 9) -> Tensor:
    return gaussian((m, columns), seed, 7)


def singular_values(tensor: Tensor) -> Tensor:
    return torch.linalg.svd(tensor.double(), full_matrices=False)[1]


def projected(tensor: Tensor, basis: Tensor) -> Tensor:
    """What the columns of `basis` span of `tensor`."""
    left, values, _ = torch.linalg.svd(basis.double(), full_matrices=False)
    left = left[:, values > 1e-12 * values.max()]
    return left @ (left.mT @ tensor.double())


@st.composite
def shrinkings(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(m, r, r', seed) with r' < r <= m."""
    m = draw(st.integers(2, 12))
    r = draw(st.integers(2, min(m, 6)))
    return m, r, draw(st.integers(1, r - 1)), draw(seeds())


@settings(max_examples=150)
@given(shrinkings())
def test_a_lower_rank_keeps_the_largest_singular_values(case: tuple[int, int, int, int]) -> None:
    m, r, columns, seed = case
    kept = factor(m, r, seed)
    found, values = resized(kept, drawn(m, columns)), singular_values(kept)
    assert found.shape == (m, columns) and found.dtype == torch.float64
    largest = values[0]
    # They are the lengths of the columns, the longest first, at right angles to each other.
    assert (found.norm(dim=0) - values[:columns]).abs().max() <= ROUNDING * largest
    products = found.mT @ found
    assert (products - products.diag().diag()).abs().max() <= ROUNDING * largest**2
    # As many of the factor's squares as any subspace of this dimension can have.
    assert abs(found.norm() - values[:columns].norm()) <= ROUNDING * largest
    lost = kept - projected(kept, found)
    assert lost.norm() <= values[columns:].norm() * (1 + ROUNDING) + ROUNDING * largest
    # Signs are those that make the largest coefficient positive. Coefficients are V's columns.
    coefficients = torch.linalg.lstsq(kept, found).solution
    assert (coefficients.gather(0, coefficients.abs().argmax(dim=0, keepdim=True)) > 0).all()


def test_leading_columns_would_have_had_less() -> None:
    kept = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert resized(kept, drawn(3, 2)).tolist() == [[0.0, 0.0], [0.0, 2.0], [3.0, 0.0]]


@st.composite
def growths(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A factor of one of the dtypes, at one of the scales, and a higher rank that it may have."""
    m = draw(st.integers(2, 12))
    r = draw(st.integers(1, min(m - 1, 5)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    kept = gaussian((m, r), draw(seeds())) * draw(st.sampled_from([1e-36, 1e-30, 1.0, 1e30]))
    return kept.to(dtype), draw(st.integers(r + 1, m))


@settings(max_examples=100)
@given(growths())
def test_a_higher_rank_keeps_all_columns_bitwise_and_appends_shorter_ones(
    case: tuple[Tensor, int],
) -> None:
    kept, columns = case
    (m, r), dtype = kept.shape, kept.dtype
    fresh = drawn(m, columns)
    found = resized(kept, fresh)
    assert torch.equal(found[:, :r], kept.double())
    new, shortest = found[:, r:], kept.double().norm(dim=0).min()
    # No shorter than what has all its digits in the dtype in which it will be kept.
    info = torch.finfo(dtype)
    bound = (shortest / 1000).clamp_min(info.tiny / info.eps * (1 + ROUNDING))
    assert (new.norm(dim=0) <= bound).all()
    assert ((new.to(dtype) - new).norm(dim=0) <= info.eps * new.norm(dim=0)).all()
    # They point where the generator says.
    directions = fresh[:, r:] / fresh[:, r:].norm(dim=0)
    assert (new / new.norm(dim=0) - directions).abs().max() <= ROUNDING


@settings(max_examples=100)
@given(growths())
def test_what_was_appended_is_what_a_lower_rank_leaves_out(case: tuple[Tensor, int]) -> None:
    kept, columns = case
    (m, r), dtype = kept.shape, kept.dtype
    grown = resized(kept, drawn(m, columns)).to(dtype)
    back = resized(grown, drawn(m, r, 10))
    # New columns N turn the subspace of K by |N N^T| beside the smallest eigenvalue of K K^T.
    turn = (grown[:, r:].double().norm() / singular_values(kept)[-1]) ** 2
    assume(turn < 0.25)  # else K has hardly the rank that it seems to have
    lost = kept.double() - projected(kept, back)
    assert lost.norm() <= (2 * turn + 8 * torch.finfo(dtype).eps) * kept.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 2, 5])
def test_of_a_factor_that_is_zero_nothing_is_kept(columns: int, dtype: torch.dtype) -> None:
    fresh = drawn(7, columns)
    assert torch.equal(resized(torch.zeros(7, 3, dtype=dtype), fresh), fresh)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("seed", range(5))
def test_columns_without_a_direction_are_drawn(
    columns: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    """A factor of rank one, with four columns."""
    column = gaussian((9, 1), seed)
    kept = (column * torch.tensor([[2.0, 0.0, 1.0, 0.0]]) * scale).to(dtype)
    fresh = drawn(9, columns)
    found = resized(kept, fresh)
    assert found.isfinite().all()
    learned = found.norm(dim=0).argmax()
    known = column[:, 0] / column.norm()
    # Rounding of `kept`, and of its products.
    eps = 4 * torch.finfo(dtype).eps
    assert abs((found[:, learned] @ known).abs() / found[:, learned].norm() - 1) <= eps
    # All columns have a direction, in their dtype as well: orthogonal matrices can be made of them.
    assert (found.to(dtype).abs().amax(dim=0) > 0).all()
    unit = found / found.norm(dim=0)
    drawn_directions = fresh / fresh.norm(dim=0)
    is_drawn = [
        bool(((unit[:, j] - drawn_directions[:, j]).abs() < 1e-12).all()) for j in range(columns)
    ]
    # With fewer columns than before there is one that was learned, with more the two that are
    # there, of which one says nothing new; the others are drawn.
    assert is_drawn.count(False) == (1 if columns < 4 else 2)


@settings(max_examples=60)
@given(
    m=st.integers(6, 40), true_rank=st.integers(1, 3), seed=seeds(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_rounding_is_not_taken_for_something_learned(
    m: int, true_rank: int, seed: int, dtype: torch.dtype
) -> None:
    low_rank = gaussian((m, true_rank), seed, 0) @ gaussian((true_rank, 6), seed, 1)
    fresh = drawn(m, 5)
    found = resized(low_rank.to(dtype), fresh)
    unit, directions = found / found.norm(dim=0), fresh / fresh.norm(dim=0)
    assert (unit[:, true_rank:] - directions[:, true_rank:]).abs().max() <= ROUNDING


@settings(max_examples=50)
@given(
    m=st.integers(2, 8), r=st.integers(1, 4), columns=st.integers(1, 8), seed=seeds(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([1e-30, 1.0, 1e30]),
)  # fmt: skip
def test_the_same_bits_for_the_same_input_which_stays_as_it_is(
    m: int, r: int, columns: int, seed: int, dtype: torch.dtype, scale: float
) -> None:
    kept, fresh = (gaussian((m, r), seed) * scale).to(dtype), drawn(m, columns)
    before = kept.clone(), fresh.clone()
    found = resized(kept, fresh)
    assert torch.equal(kept, before[0]) and torch.equal(fresh, before[1])
    assert torch.equal(found, resized(kept.clone(), fresh.clone()))
    # A view, as optimizers keep them, has the same values and no other strides to count on.
    assert torch.equal(found, resized(kept.mT.contiguous().mT, fresh))
    assert found.isfinite().all() and found.data_ptr() not in (kept.data_ptr(), fresh.data_ptr())
