"""UniformQuantized: each element becomes the nearest of some values, or is right in the mean."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efsgd.compressors.uniform_quantized import UniformQuantized
from efsgd.randomness import Draws
from efsgd.testing.gradients import gaussian
from efsgd.testing.strategies import Shape, seeds
from tests.compressors.test_quantized_compressors import (
    DTYPES,
    EXTREMES,
    a_dtype,
    decompressed,
    largest,
    some_shapes,
)

ALL_BITS = range(1, 17)


def rounding(delta: Tensor) -> float:
    """What a handful of operations in the dtype of a tensor may be off by."""
    info = torch.finfo(delta.dtype)
    return 4 * info.eps * largest(delta) + info.smallest_normal * info.eps


@pytest.mark.parametrize("stochastic", [False, True])
@settings(max_examples=150)
@given(
    shape=some_shapes,
    bits=st.sampled_from(ALL_BITS),
    dtype=a_dtype,
    shift=st.sampled_from([0.0, 1.0, -3e4]),
    seed=seeds(),
    data=st.data(),
)
def test_no_element_is_off_by_more_than_its_rounding(
    stochastic: bool,
    shape: Shape,
    bits: int,
    dtype: torch.dtype,
    shift: float,
    seed: int,
    data: st.DataObject,
) -> None:
    scale = data.draw(st.sampled_from((1.0, *EXTREMES[dtype])))
    delta = ((gaussian(shape, seed) + shift) / 1e5 * scale).to(dtype)
    sent = decompressed(UniformQuantized(bits, stochastic), delta)
    low, high = delta.double().min(), delta.double().max()
    step = (high / 2 - low / 2) * 2 / (2**bits - 1)
    off = (sent.double() - delta.double()).abs()
    assert float(off.max()) <= float(step) * (1.0 if stochastic else 0.5) + rounding(delta)
    # And it is one of the values: the same number of steps from the smallest, but for rounding.
    if step > 2 * rounding(delta):
        codes = ((sent.double() - low) / step).round()
        assert largest(low + codes * step - sent.double()) <= rounding(delta)
        assert codes.min() == 0
        assert codes.max() == 2**bits - 1
    is_extreme = (delta == delta.min()) | (delta == delta.max())
    assert torch.equal(sent[is_extreme], delta[is_extreme])


def test_codes_are_those_of_the_definition() -> None:
    delta = torch.tensor([-1.0, -0.9, 0.0, 0.31, 0.49, 0.51, 2.0])
    codes, bounds = UniformQuantized(2).compress(delta, Draws(0, 0, 0, 0))
    assert codes.tolist() == [0, 0, 1, 1, 1, 2, 3]
    assert bounds.tolist() == [-1.0, 2.0]
    wide, _ = UniformQuantized(16).compress(delta, Draws(0, 0, 0, 0))
    assert wide.tolist() == [round(21845 * (x + 1)) for x in delta.tolist()]


@pytest.mark.parametrize("bits", [1, 8, 16])
@given(value=st.floats(-(2.0**60), 2.0**60, width=32), dtype=a_dtype)
def test_equal_elements_are_exact(bits: int, value: float, dtype: torch.dtype) -> None:
    delta = torch.full((5, 3), value, dtype=dtype)
    for stochastic in (False, True):
        compressor = UniformQuantized(bits, stochastic)
        assert torch.equal(decompressed(compressor, delta), delta)
        assert not compressor.compress(delta, Draws(0, 0, 0, 0))[0].any()


@given(
    size=st.integers(1, 300), bits=st.sampled_from([1, 2, 4]), middle=st.booleans(), seed=seeds()
)
def test_what_is_left_of_codes_is_as_short_as_documented(
    size: int, bits: int, middle: bool, seed: int
) -> None:
    delta = gaussian((size,), seed)
    if middle:  # two opposite elements, and zeros half-way between two values
        delta = torch.zeros(size, dtype=torch.float64)
        delta[:1], delta[1:2] = 1.0, -1.0
    compressor = UniformQuantized(bits)
    left = float((delta - decompressed(compressor, delta)).square().sum() / delta.square().sum())
    bound = max(0, size - 2) / (2 * (2**bits - 1) ** 2)
    assert left <= bound * (1 + 1e-12) + 1e-30
    if middle:
        assert left >= bound * (1 - 1e-12) - 1e-30  # no less is true
    assert compressor.claims().contraction is None  # not for every length


@pytest.mark.parametrize("bits", [1, 3, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stochastic_rounding_is_right_in_the_mean(bits: int, dtype: torch.dtype) -> None:
    """Each frequency is within 6 standard errors, which by chance one in 5e8 is not."""
    many, last = 20_000, 2**bits - 1
    fractions = torch.tensor([0.0, 0.02, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)
    levels = ((last // 2) + fractions).repeat_interleave(many)
    delta = torch.cat([torch.tensor([0.0, last]).double(), levels]).to(dtype)
    sent = decompressed(UniformQuantized(bits, stochastic=True), delta)[2:].view(-1, many)
    found = (sent.double() - last // 2).mean(dim=1)
    given_ = (delta[2:].view(-1, many)[:, 0]).double() - last // 2
    errors = 6 * (given_ * (1 - given_) / many).sqrt()
    # The dtype has so many digits for a level and what is beyond it.
    tolerance = 4 * last * torch.finfo(dtype).eps
    assert bool(((found - given_).abs() <= errors + tolerance).all())
    assert torch.equal(found[[0, -1]], given_[[0, -1]])  # values themselves are never changed
    assert not UniformQuantized(bits).claims().is_unbiased
    claims = UniformQuantized(bits, stochastic=True).claims()
    assert claims.is_unbiased
    assert claims.is_random


def test_each_worker_rounds_by_numbers_of_its_own_and_anew_at_each_step() -> None:
    delta, compressor = gaussian((200,), 1), UniformQuantized(2, stochastic=True)
    before = torch.get_rng_state()
    sources = [Draws(0, 0, 0, 0), Draws(0, 0, 0, 1), Draws(0, 1, 0, 0), Draws(0, 0, 1, 0)]
    codes = [compressor.compress(delta, draws)[0] for draws in sources]
    assert all(not torch.equal(a, b) for a, b in pairwise([*codes, codes[0]]))
    assert torch.equal(compressor.compress(delta, sources[0])[0], codes[0])
    assert torch.equal(torch.get_rng_state(), before)
