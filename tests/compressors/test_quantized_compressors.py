"""SignNorm and UniformQuantized: what is sent for each element, and how far off it is."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd.compressors.sign_norm import SignNorm
from efsgd.compressors.spectral_atomo import SpectralAtomo
from efsgd.compressors.symmetric_quantized import SymmetricQuantized
from efsgd.compressors.tensor_compressor import TensorCompressor
from efsgd.compressors.uniform_quantized import UniformQuantized
from efsgd.randomness import Draws
from efsgd.testing.gradients import gaussian, made_up
from efsgd.testing.strategies import Shape, seeds, shapes, tensors

DTYPES = [torch.float32, torch.float64]
# As large as can be (in float64 almost), and so small that few digits are left.
EXTREMES = {torch.float32: (3e38, 1e30, 1e-30, 1e-42), torch.float64: (1e300, 1e-30, 1e-318)}


def decompressed(compressor: TensorCompressor, delta: Tensor, step: int = 0) -> Tensor:
    """What all workers make of it."""
    payload = compressor.compress(delta, Draws(0, 0, step, worker=0))
    return compressor.decompress(payload, delta.shape, Draws(0, 0, step, worker=None))


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


some_shapes = shapes().filter(lambda shape: math.prod(shape) > 0)
a_kind = st.sampled_from(("gaussian", "zero", "one_hot", "constant"))
a_dtype = st.sampled_from(DTYPES)
ATOMS = [SpectralAtomo(2), SpectralAtomo(2, sampling="rejection")]
COMPRESSORS = [
    SignNorm(), UniformQuantized(3), UniformQuantized(16), UniformQuantized(2, True),
    SymmetricQuantized(3), SymmetricQuantized(16),
]  # fmt: skip


# ---- both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_adding_is_decompressing_whatever_the_chunks(
    compressor: TensorCompressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta, start = gaussian((3, 7, 11), 1), gaussian((3, 7, 11), 2)
    ends = []
    for elements in (1, 10, 231, 2**18):
        monkeypatch.setattr("efsgd.compressors.numerics.ELEMENTS_AT_ONCE", elements)
        payload = compressor.compress(delta, Draws(0, 0, 0, worker=0))
        out = start.clone()
        compressor.add_decompressed_(out, payload, Draws(0, 0, 0, None), alpha=-0.3)
        expected = start - 0.3 * compressor.decompress(payload, delta.shape, Draws(0, 0, 0, None))
        assert largest(out - expected) < 1e-15 * largest(expected)  # a sum is rounded once or twice
        # Sums of other chunks are rounded otherwise; elements are drawn in the same order.
        assert all(largest(out - end) < 1e-15 * largest(out) for end in ends)
        ends.append(out)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
@given(dtype=a_dtype, seed=seeds(), data=st.data())
def test_neither_very_large_nor_very_small_numbers_are_lost(
    compressor: TensorCompressor, dtype: torch.dtype, seed: int, data: st.DataObject
) -> None:
    shape = data.draw(some_shapes)
    scale = data.draw(st.sampled_from(EXTREMES[dtype]))
    unit = gaussian(shape, seed).clamp(-1, 1)
    delta = (unit * scale).to(dtype)
    sent = decompressed(compressor, delta)
    assert sent.isfinite().all()
    assert largest(sent) <= largest(delta)
    assert sent.any() == delta.any()


@pytest.mark.parametrize("compressor", [*COMPRESSORS, *ATOMS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two_change_no_digit(compressor: TensorCompressor, dtype: torch.dtype) -> None:
    delta = gaussian((40, 3), 1).to(dtype)
    for factor in (2.0**-100, 2.0**100):  # 1e-30 and 1e+30
        sent = decompressed(compressor, delta * factor)
        assert sent.isfinite().all()
        assert torch.equal(sent, decompressed(compressor, delta) * factor)


def test_codes_of_all_tensors_follow_each_other() -> None:
    # 38 codes over all tensors, in whole words of four bytes, and two numbers for each.
    expected = 4 * math.ceil(38 * 5 / 32) + 3 * 2 * 8
    assert UniformQuantized(5).payload_bytes([(6, 5), (7,), ()], torch.float64) == expected


# ---- symmetric codes ----------------------------------------------------------------------------


@given(delta=tensors(some_shapes), dtype=a_dtype, bits=st.integers(2, 16))
def test_elements_are_on_a_grid_with_zero_in_it(
    delta: Tensor, dtype: torch.dtype, bits: int
) -> None:
    delta = delta.to(dtype)
    compressor, last = SymmetricQuantized(bits), 2 ** (bits - 1) - 1
    codes, scale = compressor.compress(delta, Draws(0, 0, 0, 0))
    values = delta.double().flatten().tolist()
    top = max(map(abs, values))
    assert float(scale) == top
    sent = decompressed(compressor, delta).double().flatten().tolist()
    unit = torch.finfo(dtype).eps
    for x, code, y in zip(values, codes.tolist(), sent, strict=True):
        level = x / top * last if top else 0.0
        # The quotient and the product are rounded: a level may lie that far from where it is.
        assert abs((code - last) - level) <= 0.5 + 4 * unit * last
        assert abs(y - (code - last) / last * top) <= 4 * unit * top
        assert (y == 0.0) if x == 0.0 else y * x >= 0.0
        assert abs(x) != top or y == x  # the largest is exact
        assert abs(y - x) <= abs(x) * (1 + 4 * unit)  # no worse than zero


def test_small_elements_and_zeros_stay_zero() -> None:
    delta = torch.tensor([0.0, 1.0, -0.16, 0.17, -1.0])
    assert decompressed(SymmetricQuantized(3), delta).tolist()[2:3] == [0.0]
    assert decompressed(SymmetricQuantized(3), delta).tolist()[::4] == [0.0, -1.0]
    assert float(decompressed(SymmetricQuantized(3), delta)[3]) == pytest.approx(1 / 3)


# ---- signs --------------------------------------------------------------------------------------


@given(delta=tensors(some_shapes), dtype=a_dtype)
def test_signs_and_the_mean_magnitude_are_sent(delta: Tensor, dtype: torch.dtype) -> None:
    delta = delta.to(dtype)
    values = delta.double().flatten().tolist()
    scale = math.fsum(map(abs, values)) / len(values)
    signed = [scale if value >= 0 else -scale for value in values]
    expected = torch.tensor(signed, dtype=torch.float64)
    sent = decompressed(SignNorm(), delta)
    assert sent.shape == delta.shape
    assert sent.dtype == dtype
    # The scale is rounded to the dtype once; in float64, sums of up to a thousand numbers.
    tolerance = 1e-13 if dtype == torch.float64 else 6e-8
    assert largest(sent.double().flatten() - expected) <= tolerance * scale


@given(shape=some_shapes, kind=a_kind, seed=seeds())
def test_what_is_left_of_signs_is_as_short_as_claimed(shape: Shape, kind: str, seed: int) -> None:
    delta = made_up(kind, shape, 0, seed)
    left = (delta - decompressed(SignNorm(), delta)).square().sum()
    whole, size = delta.square().sum(), delta.numel()
    exact = whole - delta.abs().sum().square() / size
    assert abs(left - exact) <= 1e-13 * whole
    claimed = SignNorm().claims().contraction
    assert claimed is not None
    assert left <= (1 - claimed(shape)) * whole + 1e-13 * whole
    if kind == "one_hot":
        assert left >= (1 - claimed(shape)) * whole - 1e-13 * whole  # no more can be claimed


def test_both_zeros_are_positive() -> None:
    delta = torch.tensor([0.0, -0.0, 3.0, -3.0])
    bits, scale = SignNorm().compress(delta, Draws(0, 0, 0, 0))
    assert bits.tolist() == [True, True, True, False]
    assert scale.tolist() == [1.5]
    assert decompressed(SignNorm(), delta).tolist() == [1.5, 1.5, 1.5, -1.5]


def test_the_mean_of_many_magnitudes_is_exact_to_the_last_digit() -> None:
    # One number after the other in float32, 2^24 ones and what follows would be lost.
    delta = torch.full((2**20 + 1,), 0.1)
    assert SignNorm().compress(delta, Draws(0, 0, 0, 0))[1].item() == delta[0].item()
