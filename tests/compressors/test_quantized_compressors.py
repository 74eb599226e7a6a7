"""SignNorm and UniformQuantized: what is sent for each element, and how far off it is."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd import ErrorFeedbackSGD
from efsgd.compressors.sign_norm import SignNorm
from efsgd.compressors.tensor_compressor import TensorCompressor
from efsgd.compressors.uniform_quantized import UniformQuantized
from efsgd.randomness import Draws
from examples.models import CifarResNet18
from tests.simulation import errors_of, parameters_of, replicated, step_with
from tests.strategies import FULL_RANK_KINDS, Shape, gaussian, make_gradient, seeds, shapes

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
        monkeypatch.setattr("efsgd.compressors.numerics._ELEMENTS_AT_ONCE", elements)
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
            total += sum(own[index] / world_size for own in gradients)
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
