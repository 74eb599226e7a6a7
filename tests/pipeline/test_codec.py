"""Tensors as messages: what arrives is what compressing each row by itself gives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd import (
    Field,
    RandomK,
    SpectralAtomo,
    SymmetricQuantized,
    TensorCompressor,
    TopK,
    UniformQuantized,
)
from efsgd.pipeline import Link
from efsgd.pipeline.codec import Codec, compute_dtype
from efsgd.randomness import Draws, RowDraws
from efsgd.testing.strategies import seeds
from efsgd.wire.payload import Format
from tests.pipeline.pair import COMPRESSORS, DTYPES, Operation, Pair, activation_shapes, made
from tests.strategies import examples


def draws_of(rows: Sequence[int], is_private: bool) -> RowDraws:
    return RowDraws(7, tuple(rows), 2, 0 if is_private else None)


def naive(compressor: TensorCompressor, x: Tensor, by_rows: bool) -> tuple[Tensor, Tensor]:
    """Each row compressed and decompressed, and the bytes of all payloads."""
    x = x.to(compute_dtype(x.dtype))
    rows = list(x) if by_rows and x.ndim > 1 else [x]
    found, payloads = [], []
    for number, row in enumerate(rows):
        payload = compressor.compress(row.contiguous(), draws_of([number], True)[0])
        found.append(compressor.decompress(payload, row.shape, draws_of([number], False)[0]))
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
    x = made((4, 20), dtype, seed)
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
    assert pair.sizes == [64, 80, 4 * (2 * wide) + 80, dtype.itemsize, 0, 4 * 16 + 24, 2]
    assert pair.sender.sent == sum(pair.sizes)
    assert pair.sender.plain == sum(own.numel() * own.itemsize for own in outputs)


@pytest.mark.parametrize(
    ("compressor", "dtype", "shape"),
    [
        (TopK(density=0.3), torch.bfloat16, (4, 1000)),
        (TopK(density=0.6), torch.float32, (4, 1000)),
        (TopK(density=0.5), torch.float32, (4, 1000)),  # as many bytes
        (RandomK(density=0.6), torch.float16, (4, 1000)),
        (UniformQuantized(bits=16), torch.bfloat16, (4, 1000)),
        (SymmetricQuantized(bits=8), torch.float32, (64, 1)),
    ],
)
def test_what_would_not_be_smaller_goes_as_it_is(
    compressor: TensorCompressor, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = made(shape, dtype, 1)
    masks: list[dict[tuple[int, int], Tensor]] = [{}, {}]
    pair = Pair(Link(compressor, memory="difference"), masks if isinstance(compressor, TopK) else
                (None, None))  # fmt: skip
    assert torch.equal(pair.step(x), x)
    assert pair.sizes == [x.numel() * dtype.itemsize]
    if isinstance(compressor, TopK):  # no positions have travelled that could be reused
        back = Pair(Link(compressor, reuse_mask=True), masks[::-1])
        assert torch.equal(back.step(x), x)
    wider = made((4, 1000), torch.float64, 1)
    assert not torch.equal(pair.step(wider), wider)
    assert pair.sizes[0] < wider.numel() * 8


def test_of_few_known_samples_what_would_not_be_smaller_goes_whole() -> None:
    """A payload is eight bytes, for up to four codes and a scale."""
    pair = Pair(Link(SymmetricQuantized(bits=8), per="microbatch", memory="samples"))
    pair.step(made((3, 1), torch.float32, 1), 0, [0, 1, 2])
    for step, (ids, size) in enumerate([([0, 1, 3], 12), ([0, 1, 2], 8)]):
        x = made((3, 1), torch.float32, 5 + step)
        found = pair.step(x, step, ids)
        assert torch.equal(found, x) == (size == 12)
        assert pair.sizes == [size]
    assert pair.digests()[0] == pair.digests()[1]


def test_microbatches_of_another_size_are_an_error_where_something_is_compressed() -> None:
    """Nine samples in four microbatches, for which torch has buffers of three."""
    for link in (Link(UniformQuantized(bits=8)), Link()):
        pair, sent = Pair(link), made((9, 8), torch.float32, 1).tensor_split(4)
        pair.begin()
        pair.carry([sent[0]])
        operation = Operation(dist.isend, sent[1])
        with mock.patch("efsgd.pipeline.ends.dist.P2POp", Operation):
            if link.codes is None:
                pair.sender.pack([operation], 1, trains=True, scale=1.0)
                continue
            with pytest.raises(ValueError, match=r"Microbatch 1 of sent has a tensor \[2, 8\].*the "
                                                 r"first .* had \[3, 8\].*drop_last"):  # fmt: skip
                pair.sender.pack([operation], 1, trains=True, scale=1.0)
            assert not pair.sender.is_done(2)


@dataclass(frozen=True)
class Signs(TensorCompressor):
    """A user's own, without any floating-point number in its payload."""

    def fields(self, shape: torch.Size) -> tuple[Field, ...]:
        return (Field(shape.numel(), bits=1),)

    def compress(self, delta: Tensor, draws: Draws) -> tuple[Tensor, ...]:
        return (delta.view(-1) > 0,)

    def decompress(self, payload: Any, shape: torch.Size, draws: Draws) -> Tensor:
        found: Tensor = payload[0].float().mul(2).sub(1).view(shape)
        return found


@pytest.mark.parametrize("value", [1.0, -1.0, torch.nan])
def test_a_payload_of_codes_alone_is_never_taken_for_nan(value: float) -> None:
    pair, x = Pair(Link(Signs())), torch.full((2, 32), value)
    assert torch.equal(pair.step(x).nan_to_num(7.0), x.nan_to_num(7.0))
    assert pair.sizes == [2 * 4 + 1]


def test_lazy_conjugates_and_negatives_go_as_they_are() -> None:
    pair, x = Pair(Link(UniformQuantized(bits=8))), made((3, 8), torch.float32, 1)
    z = torch.complex(x, x + 1).conj()
    own = [z, z.mT, z.imag, z[0, 0].imag]
    assert own[0].is_conj() and own[2].is_neg() and own[3].is_neg()
    pair.begin()
    found = pair.carry(own)
    for position in (0, 1, 3):
        assert torch.equal(found[position], own[position])
    assert (found[2] - own[2]).abs().max() < 0.02 * x.abs().max()


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
    top = TopK(density=0.2)
    forwards = Pair(Link(top, per=per), masks)
    # The gradient's sender is the activation's receiver.
    backwards = Pair(Link(top, per=per, memory=memory, reuse_mask=True), masks[::-1])
    shapes = [(4, 10), (4, 2, 10)]
    for step in range(2):
        forwards.begin(step)
        backwards.begin(step)
        activations = [made(shape, dtype, seed, step, n) for n, shape in enumerate(shapes)]
        gradients = [made(shape, dtype, seed, step, n, 1) for n, shape in enumerate(shapes)]
        # Integers have no gradients: numbers of outputs are not those of gradients.
        _, *sent = forwards.carry([torch.ones(4, dtype=torch.long), *activations])
        found = backwards.carry(gradients)
        value = compute_dtype(dtype).itemsize
        counts = [4 * 2, 4 * 4] if per == "sample" else [40 // 5, 80 // 5]
        assert backwards.sizes == [count * value for count in counts]
        for activation, gradient, own in zip(sent, found, gradients, strict=True):
            assert int((activation != 0).sum()) in counts
            if step == 0:
                assert torch.equal(gradient, torch.where(activation != 0, own, 0))
        forwards.end()
        backwards.end()


def test_reused_masks_need_a_gradient_of_each_output() -> None:
    masks: list[dict[tuple[int, int], Tensor]] = [{}, {}]
    forwards = Pair(Link(TopK(density=0.2)), masks)
    backwards = Pair(Link(TopK(density=0.2), reuse_mask=True), masks[::-1])
    for pair in (forwards, backwards):
        pair.begin()
    forwards.carry([torch.ones(2, 10), torch.ones(2, 10)])
    one, words = torch.ones(2, 10), "1 gradients for 2 outputs .*reuse_mask=False"
    with pytest.raises(ValueError, match=f"sent: {words}"):
        backwards.sender.pack([Operation(dist.isend, one)], 0, trains=True, scale=1.0)
    with pytest.raises(ValueError, match=f"received: {words}"):
        backwards.receiver.expect([Operation(dist.irecv, one)], 0, trains=True)


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
