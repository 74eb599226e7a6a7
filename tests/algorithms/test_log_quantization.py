"""Logarithmic codes: the laws of the codec, against its definition written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd.algorithms.quantization.log_quantizer import LogQuantizer
from efsgd.testing.gradients import gaussian
from efsgd.testing.strategies import seeds
from efsgd.wire.bits import pack, unpack

ALPHAS = (0.0, 1e-300, 1e-12, 1e-8, 1e-3, 1.0, 10.0, 1e3, 1e6)
EXTREME_ALPHAS = (*ALPHAS, 1e30, 1.79e308)
DTYPES = (torch.float32, torch.float64)
BITS = tuple(range(2, 33))
NARROW = tuple(range(2, 17))


def q(x: float, alpha: float) -> float:
    """The definition, for numbers where it can be evaluated as it stands."""
    return math.copysign(math.log(1 + alpha * abs(x)) / math.log(1 + alpha), x)


def scale_of(x: Tensor) -> Tensor:
    return x.abs().amax()


def some_codes(quantizer: LogQuantizer, seed: int) -> Tensor:
    """All codes, or where there are many the smallest, the largest, and some between them."""
    L = quantizer.levels
    if L <= 2**11:
        return torch.arange(-L, L + 1)
    near = torch.arange(200)
    generator = torch.Generator().manual_seed(seed)
    between = torch.randint(-L, L + 1, (1000,), generator=generator)
    return torch.cat([near, -near, L - near, near - L, between])


@given(st.sampled_from([1e-3, 1.0, 10.0, 1e3]), st.floats(-1, 1, allow_subnormal=False))
def test_numbers_are_companded_by_the_definition(alpha: float, x: float) -> None:
    quantizer = LogQuantizer(8, alpha)
    found = quantizer.compand(torch.tensor(x, dtype=torch.float64)).item()
    # 1 + alpha |x| loses digits below 1e-16 of it, of a logarithm of about alpha.
    assert abs(found - q(x, alpha)) <= 4e-16 / min(alpha, 1)
    back = quantizer.expand(torch.tensor(found, dtype=torch.float64)).item()
    # Rounding of q, times the slope ln(1 + α)(1 + α)^q / α, of up to 7 for these.
    assert abs(back - x) <= 1e-14


@pytest.mark.parametrize("alpha", EXTREME_ALPHAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_the_ends_stay_what_they_are(alpha: float, dtype: torch.dtype) -> None:
    if torch.log1p(torch.tensor([alpha], dtype=torch.float64)).isinf():
        pytest.skip(f"this torch's log1p of {alpha} overflows")
    ends = torch.tensor([-1.0, 0.0, 1.0], dtype=dtype)
    for bits in (2, 8, 16, 17, 32):
        quantizer = LogQuantizer(bits, alpha)
        assert torch.equal(quantizer.compand(ends.double()), ends.double())
        assert torch.equal(quantizer.expand(ends.double()), ends.double())
        codes = quantizer.encode(ends, torch.tensor(1.0, dtype=dtype))
        assert codes.tolist() == [-quantizer.levels, 0, quantizer.levels]
        for scale in (0.7, 1e-30, 1e30):
            own = torch.tensor(scale, dtype=dtype)
            assert torch.equal(quantizer.decode(codes, own), ends * own)


@pytest.mark.parametrize("alpha", [0.0, 1e-300, 1e-17, 1e-12, 1e-8])
def test_a_small_alpha_is_nearly_a_straight_line(alpha: float) -> None:
    x = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    for curve in (LogQuantizer(8, alpha).compand, LogQuantizer(8, alpha).expand):
        # αx(1 - x)/2 is the first term of the difference; and some rounding, relative to x.
        assert bool(((curve(x) - x).abs() <= alpha / 8 + 4e-16 * x.abs()).all())


@given(
    st.sampled_from(BITS), st.sampled_from(EXTREME_ALPHAS), st.sampled_from(DTYPES), seeds(),
    st.integers(-60, 60),
)  # fmt: skip
def test_codes_are_odd_monotone_and_do_not_see_powers_of_two(
    bits: int, alpha: float, dtype: torch.dtype, seed: int, exponent: int
) -> None:
    quantizer = LogQuantizer(bits, alpha)
    x = gaussian((200,), seed).to(dtype).sort().values
    scale = scale_of(x)
    codes = quantizer.encode(x, scale)
    assert torch.equal(quantizer.encode(-x, scale), -codes)
    assert bool((codes.diff() >= 0).all())
    assert int(codes.abs().max()) == quantizer.levels
    values = quantizer.decode(codes, scale)
    assert values.dtype == dtype
    assert bool((values.diff() >= 0).all())
    assert torch.equal(quantizer.encode(x * 2.0**exponent, scale * 2.0**exponent), codes)
    if alpha <= 1e6:  # otherwise small levels leave the range of normal numbers
        scaled = quantizer.decode(codes, scale * 2.0**exponent)
        assert torch.equal(scaled, values * 2.0**exponent)


@given(
    st.one_of(
        st.tuples(st.sampled_from(NARROW), st.sampled_from(ALPHAS), st.sampled_from(DTYPES)),
        st.tuples(st.sampled_from(BITS), st.sampled_from(EXTREME_ALPHAS), st.just(torch.float64)),
    ),
    st.sampled_from([1.0, 0.7, 3e-30, 5e30]),
    seeds(),
)
def test_what_codes_decode_to_has_the_same_codes(
    setting: tuple[int, float, torch.dtype], scale: float, seed: int
) -> None:
    bits, alpha, dtype = setting
    quantizer = LogQuantizer(bits, alpha)
    codes, own = some_codes(quantizer, seed), torch.tensor(scale, dtype=dtype)
    if alpha > 1e100:  # the smallest of these levels are no normal numbers times 1e-30
        own = torch.ones_like(own)
    assert torch.equal(quantizer.encode(quantizer.decode(codes, own), own), codes)


@given(st.sampled_from(BITS), st.sampled_from(ALPHAS), st.sampled_from(DTYPES), seeds())
def test_no_number_is_moved_further_than_half_a_step(
    bits: int, alpha: float, dtype: torch.dtype, seed: int
) -> None:
    quantizer = LogQuantizer(bits, alpha)
    x = gaussian((300,), seed).to(dtype)
    x[::3] *= 1e-3
    scale = scale_of(x)
    moved = (quantizer.decode(quantizer.encode(x, scale), scale) - x).abs().double()
    s, L, log = float(scale), quantizer.levels, math.log1p(alpha)
    slope = log * x.abs().double() / s + (log / alpha if alpha > 0 else 1.0)
    # The slope grows by (1 + α)^(1 / 2L) over half a step. Rounding, of 6e-8 or 1e-16, is that of
    # q in both directions and of the results.
    rounding = 4 * torch.finfo(dtype).eps * (x.abs().double() + s * slope)
    assert bool((moved <= s * slope / (2 * L) * math.exp(log / (2 * L)) + rounding).all())


@pytest.mark.parametrize("bits", [2, 3, 8, 16, 17, 32])
def test_codes_are_those_of_the_definition(bits: int) -> None:
    quantizer = LogQuantizer(bits, 10.0)
    x = gaussian((500,), 3)
    scale = float(scale_of(x))
    expected = [round(quantizer.levels * q(value / scale, 10.0)) for value in x.tolist()]
    found = quantizer.encode(x, scale_of(x)).tolist()
    # Rounding of q, of 2e-16, may decide for a neighbor where there are billions of them.
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= (bits > 24)


@given(st.sampled_from(BITS), st.sampled_from(ALPHAS), seeds())
def test_packed_codes_decode_to_the_same(bits: int, alpha: float, seed: int) -> None:
    quantizer, scale = LogQuantizer(bits, alpha), torch.tensor(0.7, dtype=torch.float64)
    codes = some_codes(quantizer, seed)
    arrived = unpack(pack(codes & (2**bits - 1), bits), len(codes), bits)
    assert torch.equal(quantizer.decode(arrived, scale), quantizer.decode(codes, scale))
    nothing = unpack(torch.zeros_like(pack(codes & 1, bits)), len(codes), bits)
    assert not quantizer.decode(nothing, scale).any()


@pytest.mark.parametrize("bits", [2, 8, 16, 17, 32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_sixty_orders_of_magnitude_survive(bits: int, dtype: torch.dtype) -> None:
    quantizer = LogQuantizer(bits)
    zeros = torch.zeros(5, dtype=dtype)
    assert not quantizer.encode(zeros, scale_of(zeros)).any()
    assert not quantizer.decode(torch.full((5,), quantizer.levels), zeros).any()
    x = gaussian((50,), 1).to(dtype)
    expected = quantizer.encode(x, scale_of(x))
    for factor in (1e-30, 1e30):
        scaled = x * factor
        codes = quantizer.encode(scaled, scale_of(scaled))
        # x * factor is rounded, at 6e-8 in float32: less than half a step, and so one code at most
        # with up to 16 bits; and 128 codes of the 2^31.
        step = 1 if bits <= 17 else (256 if dtype == torch.float32 else 1)
        assert int((codes - expected).abs().max()) <= step
        assert bool(quantizer.decode(codes, scale_of(scaled)).isfinite().all())
