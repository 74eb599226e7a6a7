"""Tensors as messages: what arrives is what compressing each row by itself gives."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd import SpectralAtomo, TensorCompressor, TopK, UniformQuantized
from efsgd.pipeline import Link
from efsgd.pipeline.codec import Codec, compute_dtype
from efsgd.randomness import Draws
from efsgd.testing.strategies import seeds
from efsgd.wire.payload import Format
from tests.pipeline.pair import COMPRESSORS, DTYPES, Pair, activation_shapes, made
from tests.strategies import examples


def draws_of(row: int, is_private: bool) -> Draws:
    return Draws(7, row, 2, 0 if is_private else None)


def naive(compressor: TensorCompressor, x: Tensor, by_rows: bool) -> tuple[Tensor, Tensor]:
    """Each row compressed and decompressed, and the bytes of all payloads."""
    x = x.to(compute_dtype(x.dtype))
    rows = list(x) if by_rows and x.ndim > 1 else [x]
    found, payloads = [], []
    for number, row in enumerate(rows):
        payload = compressor.compress(row.contiguous(), draws_of(number, True))
        found.append(compressor.decompress(payload, row.shape, draws_of(number, False)))
        payloads.append(payload)
    form = Format([compressor.fields(rows[0].shape)] * len(rows), x.dtype)
    buffer = torch.empty(form.nbytes, dtype=torch.uint8)
    form.pack_(payloads, buffer)
    return torch.stack(found).view(x.shape), buffer


@pytest.mark.parametrize("compressor", [*COMPRESSORS, SpectralAtomo(rank=1)], ids=repr)
@examples(15)
@given(
    shape=activation_shapes, dtype=st.sampled_from(DTYPES), by_rows=st.booleans(), seed=seeds(),
    first=st.sampled_from([1.0, 0.0]), at_once=st.sampled_from([10, 2**18]),
)  # fmt: skip
def test_a_message_decodes_to_what_its_rows_decode_to(
    compressor: TensorCompressor, shape: tuple[int, ...], dtype: torch.dtype, by_rows: bool,
    seed: int, first: float, at_once: int,
) -> None:  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efsgd.pipeline.codec.ELEMENTS_AT_ONCE", at_once)
        check_message(compressor, shape, dtype, by_rows, seed, first)


def check_message(
    compressor: TensorCompressor, shape: tuple[int, ...], dtype: torch.dtype, by_rows: bool,
    seed: int, first: float,
) -> None:  # fmt: skip
    """Compares bytes and what they decode to with those of each row by itself."""
    codec, x = Codec(compressor, by_rows=by_rows), made(shape, dtype, seed)
    x[0] *= first  # zeros of both signs, perhaps
    if not codec.compresses(x.shape, dtype):
        return
    buffer = codec.encode(x, draws_of)
    assert buffer.dtype == torch.uint8 and buffer.shape == (codec.nbytes(x.shape, dtype),)
    expected, expected_buffer = naive(compressor, x, by_rows)
    assert torch.equal(buffer, expected_buffer)
    found = codec.decode(buffer, x.shape, dtype, draws_of)
    assert found.dtype == compute_dtype(dtype)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_arrives_as_nan(compressor: TensorCompressor, value: float) -> None:
    codec, x = Codec(compressor, by_rows=True), made((3, 10), torch.float32, 1)
    assert codec.decode(codec.encode(x, draws_of), x.shape, x.dtype, draws_of).isfinite().all()
    x[1, 2] = value
    assert codec.decode(codec.encode(x, draws_of), x.shape, x.dtype, draws_of).isnan().all()


@examples(40)
@given(st.sampled_from(DTYPES), st.sampled_from([1.0, 2.0**10, 3.0]), seeds())
def test_outputs_keep_their_dtypes_and_integers_go_as_they_are(
    dtype: torch.dtype, scale: float, seed: int
) -> None:
    pair = Pair(Link(UniformQuantized(bits=8)))
    x = made((4, 5), dtype, seed)
    outputs = [
        torch.arange(8).view(4, 2),
        x > 0,
        x.mT.contiguous().mT,  # columns lie together
        torch.tensor(2.5, dtype=dtype),
        torch.empty(4, 0, dtype=dtype),
        made((4, 3, 2), torch.float64, seed, 1),
        torch.tensor([1, -1], dtype=torch.int8),
    ]
    pair.begin()
    found = pair.carry(outputs, scale=scale)
    for position in (0, 1, 3, 4, 6):
        assert torch.equal(found[position], outputs[position])
    for position in (2, 5):
        own = outputs[position]
        assert found[position].dtype == own.dtype
        # Half a step of 255, and the rounding of the dtype.
        limit = (own.amax() - own.amin()) / 510 + own.abs().max() * 2 * torch.finfo(own.dtype).eps
        assert (found[position] - own).abs().max() <= limit * 1.001
        assert not torch.equal(found[position], own)
    wide = 8 if dtype == torch.float64 else 4
    assert pair.sizes == [64, 20, 4 * (2 * wide) + 20, dtype.itemsize, 0, 4 * 16 + 24, 2]
    assert pair.sender.sent == sum(pair.sizes)
    assert pair.sender.plain == sum(own.numel() * own.itemsize for own in outputs)


def test_a_link_without_a_compressor_changes_nothing() -> None:
    pair, x = Pair(Link()), made((3, 4), torch.float32, 1)
    assert torch.equal(pair.step(x), x)
    assert pair.sizes == [48] and pair.sender.sent == pair.sender.plain == 48


@examples(40)
@given(
    st.sampled_from(["sample", "microbatch"]), st.sampled_from(["none", "error", "difference"]),
    st.sampled_from(DTYPES), seeds(),
)  # fmt: skip
def test_a_reused_mask_sends_values_at_the_positions_that_went_forwards(
    per: str, memory: str, dtype: torch.dtype, seed: int
) -> None:
    masks: list[dict[tuple[int, int], Tensor]] = [{}, {}]
    top = TopK(density=0.25)
    forwards = Pair(Link(top, per=per), masks)
    # The gradient's sender is the activation's receiver.
    backwards = Pair(Link(top, per=per, memory=memory, reuse_mask=True), masks[::-1])
    shapes = [(4, 9), (4, 2, 5)]
    for step in range(2):
        forwards.begin()
        backwards.begin()
        activations = [made(shape, dtype, seed, step, n) for n, shape in enumerate(shapes)]
        gradients = [made(shape, dtype, seed, step, n, 1) for n, shape in enumerate(shapes)]
        # Integers have no gradients: numbers of outputs are not those of gradients.
        _, *sent = forwards.carry([torch.ones(4, dtype=torch.long), *activations], step=step)
        found = backwards.carry(gradients, step=step)
        value = compute_dtype(dtype).itemsize
        counts = [4 * 2, 4 * 2] if per == "sample" else [36 // 4, 40 // 4]
        assert backwards.sizes == [count * value for count in counts]
        for activation, gradient, own in zip(sent, found, gradients, strict=True):
            assert int((activation != 0).sum()) in counts
            if step == 0:
                assert torch.equal(gradient, torch.where(activation != 0, own, 0))
        forwards.end()
        backwards.end()


def test_a_gradient_that_is_not_finite_outside_of_the_mask_arrives_as_nan() -> None:
    masks: list[dict[tuple[int, int], Tensor]] = [{}, {}]
    forwards = Pair(Link(TopK(density=0.25)), masks)
    backwards = Pair(Link(TopK(density=0.25), memory="error", reuse_mask=True), masks[::-1])
    sent = forwards.step(torch.arange(8.0).view(2, 4))
    gradient = torch.ones(2, 4)
    gradient[0, 0] = torch.inf
    assert sent[0, 0] == 0
    before = backwards.digests()
    assert backwards.step(gradient).isnan().all()
    assert backwards.digests() == before
    # An activation that is not finite has no mask; what follows is not hidden either.
    forwards.step(torch.full((2, 4), torch.nan))
    assert backwards.step(gradient).isnan().all()


@pytest.mark.parametrize(
    ("compressor", "nbytes"),
    [
        (None, 458_752),
        (UniformQuantized(bits=4), 57_368),
        (UniformQuantized(bits=8), 114_712),
        (TopK(density=0.1), 91_736),  # the paper rounds k up, and has 91,760
    ],
)
def test_bytes_of_a_sample_at_the_boundaries_of_the_paper(
    compressor: TensorCompressor | None, nbytes: int
) -> None:
    """ResNet18 in four stages."""
    pair = Pair(Link(compressor))
    pair.begin()
    pair.carry([torch.ones(1, 64, 32, 32), torch.ones(1, 128, 16, 16), torch.ones(1, 256, 8, 8)])
    assert sum(pair.sizes) == pair.sender.sent == nbytes
