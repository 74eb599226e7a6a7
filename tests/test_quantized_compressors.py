"""SignNorm and UniformQuantized: what is sent for each element, and how far off it is."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efsgd import ErrorFeedbackSGD
from efsgd.compressors.sign_norm import SignNorm
from efsgd.compressors.tensor_compressor import TensorCompressor
from efsgd.compressors.uniform_quantized import UniformQuantized
from efsgd.units import Draws
from examples.models import CifarResNet18
from tests.simulation import errors_of, parameters_of, replicated, step_with
from tests.strategies import FULL_RANK_KINDS, Shape, gaussian, make_gradient, seeds, shapes

ALL_BITS = range(1, 17)
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
COMPRESSORS = [SignNorm(), UniformQuantized(3), UniformQuantized(16), UniformQuantized(2, True)]


# ---- both ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_adding_is_decompressing_whatever_the_pieces(
    compressor: TensorCompressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta, start = gaussian((3, 7, 11), 1), gaussian((3, 7, 11), 2)
    ends = []
    for elements in (1, 10, 231, 2**18):
        monkeypatch.setattr("efsgd.pieces._ELEMENTS_AT_ONCE", elements)
        payload = compressor.compress(delta, Draws(0, 0, 0, worker=0))
        out = start.clone()
        compressor.add_decompressed_(out, payload, Draws(0, 0, 0, None), alpha=-0.3)
        expected = start - 0.3 * compressor.decompress(payload, delta.shape, Draws(0, 0, 0, None))
        assert largest(out - expected) < 1e-15 * largest(expected)  # a sum is rounded once or twice
        # Sums of other pieces are rounded otherwise; elements are drawn in the same order.
        assert all(largest(out - end) < 1e-15 * largest(out) for end in ends)
        ends.append(out)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
@given(shape=some_shapes, dtype=a_dtype)
def test_zeros_are_sent_as_zeros(
    compressor: TensorCompressor, shape: Shape, dtype: torch.dtype
) -> None:
    assert not decompressed(compressor, torch.zeros(shape, dtype=dtype)).any()
    size = math.prod(shape)
    announced = compressor.fields(torch.Size(shape))
    codes = torch.bool if announced[0].bits == 1 else torch.uint8
    payload = torch.zeros(size, dtype=codes), torch.zeros(announced[1].count, dtype=dtype)
    assert not compressor.decompress(payload, torch.Size(shape), Draws(0, 0, 0, None)).any()


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


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_powers_of_two_change_no_digit(compressor: TensorCompressor) -> None:
    delta = gaussian((40, 3), 1).float()
    for factor in (2.0**-80, 2.0**80):
        assert torch.equal(
            decompressed(compressor, delta * factor), decompressed(compressor, delta) * factor
        )


class PerGroup:
    """Three tensors in two groups, for workers whose gradients are all their own."""

    SHAPES: tuple[Shape, ...] = ((6, 5), (7,), ())

    def __init__(self, compressor: TensorCompressor, world_size: int, **of_a_group: Any) -> None:
        self.workers = []
        for _ in range(world_size):
            own = [torch.zeros(s, dtype=torch.float64).requires_grad_() for s in self.SHAPES]
            groups = [{"params": own[:2]}, {"params": own[2:], **of_a_group}]
            options: dict[str, Any] = {"lr": 1.0, "momentum_form": "sgd"}
            self.workers.append(ErrorFeedbackSGD(groups, compressor=compressor, **options))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    ("compressor", "of_a_group"),
    [
        (SignNorm(), {}),
        (UniformQuantized(1), {"bits": 12}),
        (UniformQuantized(4, stochastic=True), {"stochastic": False}),
    ],
    ids=str,
)
def test_nothing_is_lost_and_workers_stay_equal(
    compressor: TensorCompressor, of_a_group: dict[str, Any], world_size: int
) -> None:
    workers = PerGroup(compressor, world_size, **of_a_group).workers
    received = [torch.zeros(shape, dtype=torch.float64) for shape in PerGroup.SHAPES]
    for step in range(5):
        kind = "zero" if step == 3 else FULL_RANK_KINDS[step % 2]
        gradients: list[list[Tensor | None]] = [
            [make_gradient(s, kind, worker, step, i) for i, s in enumerate(PerGroup.SHAPES)]
            for worker in range(world_size)
        ]
        step_with(workers, gradients)
        for index, total in enumerate(received):
            total += sum(own[index] / world_size for own in gradients)  # type: ignore[operator]
            kept = torch.stack([errors_of(worker)[index] for worker in workers]).mean(0)
            applied = -parameters_of(workers[0])[index].detach()
            # 1e-16 of the largest gradients, 1e4, for some dozen sums.
            assert largest(total - applied - kept) < 1e-10
        assert all(replicated(worker) == replicated(workers[0]) for worker in workers)


def test_bytes_sent_are_bytes_announced() -> None:
    bits, rest = 5, UniformQuantized(5)
    trace = step_with(
        PerGroup(rest, 2).workers, [[gaussian(s, w) for s in PerGroup.SHAPES] for w in range(2)]
    )
    sent = [traced for traced in trace if traced.purpose == "payload"]
    # 38 codes over all tensors, in whole words of four bytes, and two numbers for each.
    expected = 4 * math.ceil(38 * bits / 32) + 3 * 2 * 8
    assert [traced.nbytes for traced in sent] == [expected]
    assert rest.payload_bytes(PerGroup.SHAPES, torch.float64) == expected


# ---- signs --------------------------------------------------------------------------------------


@given(shape=some_shapes, kind=a_kind, dtype=a_dtype, seed=seeds())
def test_signs_and_the_mean_magnitude_are_sent(
    shape: Shape, kind: str, dtype: torch.dtype, seed: int
) -> None:
    delta = make_gradient(shape, kind, 0, seed).to(dtype)
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
    delta = make_gradient(shape, kind, 0, seed)
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


def test_the_volume_of_sign_and_norm_in_the_paper() -> None:
    """Table 4 of PowerSGD (arXiv 1905.13727) has 32 MB in an epoch of 24 steps."""
    sizes = [tuple(p.shape) for p in CifarResNet18().parameters()]
    sent = SignNorm().payload_bytes(sizes)
    assert sent == 1_396_748 + 62 * 4 == 1_396_996
    assert f"{24 * sent / 2**20:.0f}" == "32"


# ---- uniform quantization -----------------------------------------------------------------------


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
        assert torch.equal(decompressed(UniformQuantized(bits, stochastic), delta), delta)


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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 0}, "Invalid bits: 0. Must be an integer from 1 to 16"),
        ({"bits": 17}, "Invalid bits: 17"),
        ({"bits": 4.0}, "Invalid bits: 4.0"),
        ({"bits": True}, "Invalid bits: True"),
        ({"stochastic": 1}, "Invalid stochastic: 1. Must be a bool"),
        ({"seed": -1}, "Invalid seed: -1. Must be an integer, at least 0"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UniformQuantized(**options)
    if "seed" not in options:
        with pytest.raises(ValueError, match=words):
            PerGroup(UniformQuantized(), 1, **options)
