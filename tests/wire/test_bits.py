"""Codes are packed without gaps, and payloads lie in one buffer, where they were announced."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from efsgd.randomness import generator_of
from efsgd.testing.strategies import seeds
from efsgd.wire.bits import MAX_BITS, pack, packed_size, unpack
from efsgd.wire.payload import Field, Format, position_dtype
from tests.strategies import examples

ALL_BITS = range(1, MAX_BITS + 1)
COUNTS = st.integers(0, 70)


def some_codes(count: int, bits: int, *seed: int) -> Tensor:
    """From 0 to 2**bits - 1, both of them among the first: [count] int64."""
    codes = torch.randint(2**bits, (count,), generator=generator_of(count, bits, *seed))
    codes[:1], codes[1:2] = 2**bits - 1, 0
    return codes


def as_number(packed: Tensor) -> int:
    """The bytes as one integer, the first byte lowest."""
    return int.from_bytes(bytes(packed.tolist()), "little")


# ---- bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", ALL_BITS)
@examples(20)
@given(count=COUNTS, seed=seeds())
def test_what_is_packed_is_unpacked(bits: int, count: int, seed: int) -> None:
    codes = some_codes(count, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(count, bits),)
    widths = {1: torch.bool, 8: torch.uint8, 31: torch.int32, 32: torch.int64}
    expected = next(dtype for most, dtype in widths.items() if bits <= most)
    unpacked = unpack(packed, count, bits)
    assert unpacked.dtype == expected
    assert unpacked.tolist() == codes.to(expected).tolist()


@pytest.mark.parametrize("bits", range(1, 9))
@given(count=COUNTS, seed=seeds())
def test_a_code_follows_the_one_before_it_from_the_lowest_bit_on(
    bits: int, count: int, seed: int
) -> None:
    codes = some_codes(count, bits, seed)
    number = sum(code << (bits * place) for place, code in enumerate(codes.tolist()))
    assert as_number(pack(codes, bits)) == number


@pytest.mark.parametrize("bits", range(9, MAX_BITS + 1))
def test_of_wide_codes_the_lowest_bytes_come_first(bits: int) -> None:
    codes = some_codes(21, bits)
    packed = pack(codes, bits)
    for first in range(0, bits, 8):
        width = min(8, bits - first)
        size = packed_size(21, width)
        part = pack((codes >> first) & (2**width - 1), width)
        assert torch.equal(packed[:size], part)
        packed = packed[size:]
    assert len(packed) == 0


@pytest.mark.parametrize("bits", ALL_BITS)
def test_eight_codes_are_as_many_bytes_as_a_code_has_bits(bits: int) -> None:
    for count in range(25):
        assert 0 <= 8 * packed_size(count, bits) - count * bits < 8


@pytest.mark.parametrize("bits", ALL_BITS)
def test_all_integer_dtypes_and_strides_are_packed_alike(bits: int) -> None:
    codes = some_codes(40, bits, 1)
    expected = pack(codes, bits)
    variants = [torch.stack([codes, codes], dim=1)[:, 0], torch.cat([codes[:3], codes])[3:]]
    narrow = {torch.bool: 1, torch.uint8: 8, torch.int16: 15, torch.int32: 31}
    variants += [codes.to(dtype) for dtype, most in narrow.items() if bits <= most]
    for variant in variants:
        before = variant.clone()
        assert torch.equal(pack(variant, bits), expected)
        assert torch.equal(variant, before)
    few = some_codes(40, 1)  # a dtype may be narrower than the codes
    assert torch.equal(pack(few.bool(), bits), pack(few, bits))
    for first in range(4):  # a packed part of a buffer need not be aligned
        buffer = torch.cat([torch.full((first,), 255, dtype=torch.uint8), expected])
        before = buffer.clone()
        assert unpack(buffer[first:], 40, bits).tolist() == codes.tolist()
        assert torch.equal(buffer, before)


@pytest.mark.parametrize("bits", [-1, 0, 33])
def test_numbers_of_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"Invalid bits: {bits}. Must be from 1 to 32"):
        pack(torch.zeros(3, dtype=torch.int64), bits)
    with pytest.raises(ValueError, match=f"Invalid bits: {bits}. Must be from 1 to 32"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, bits)


# ---- payloads -----------------------------------------------------------------------------------

DTYPES = [None, torch.float16, torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64]


def fields() -> st.SearchStrategy[Field]:
    """Values of any dtype, or codes of any number of bits."""
    counts = st.integers(0, 20)
    values = st.builds(Field, counts, dtype=st.sampled_from(DTYPES))
    return st.one_of(values, st.builds(Field, counts, bits=st.sampled_from([1, 2, 4, 7, 8, 9, 16])))


announcements = st.lists(st.lists(fields(), max_size=4), max_size=5)


def a_payload(announced: list[Field], dtype: torch.dtype, *seed: int) -> list[Tensor]:
    """Codes, and random bytes taken for values: NaNs among them."""
    payload = []
    for place, field in enumerate(announced):
        if field.bits is not None:
            codes = some_codes(field.count, field.bits, place, *seed)
            integers = [torch.int32, torch.int64]
            payload.append(codes.to(torch.bool if field.bits == 1 else integers[place % 2]))
        else:
            own = dtype if field.dtype is None else field.dtype
            size = field.count * own.itemsize
            raw = torch.randint(256, (size,), generator=generator_of(place, *seed))
            payload.append(raw.to(torch.uint8).view(own))
    return payload


def raw(tensor: Tensor) -> list[int]:
    numbers: list[int] = tensor.contiguous().view(torch.uint8).tolist()
    return numbers


def size_of(announced: list[list[Field]], dtype: torch.dtype) -> int:
    """By the definition: values, then codes of each width in whole words of four bytes."""
    every = list(itertools.chain(*announced))
    values = [field for field in every if field.bits is None]
    size = sum(f.count * (f.dtype or dtype).itemsize for f in values)
    for bits in {field.bits for field in every if field.bits is not None}:
        size += -size % 4
        size += 4 * -(-sum(f.count for f in every if f.bits == bits) * bits // 32)
    return size


@examples(200)
@example([], torch.float32, 0)
@example([[]], torch.float32, 0)
@example([[Field(0), Field(0, bits=3)]], torch.float32, 0)
@example([[Field(5, bits=1), Field(1)]] * 64, torch.float32, 0)
@given(announcements, st.sampled_from([torch.float32, torch.float64]), seeds())
def test_payloads_come_out_of_the_buffer_as_they_went_in(
    announced: list[list[Field]], dtype: torch.dtype, seed: int
) -> None:
    format = Format(announced, dtype)
    assert format.nbytes == size_of(announced, dtype)
    payloads = [a_payload(own, dtype, seed, place) for place, own in enumerate(announced)]
    for old in (0, 255):  # whatever was in the buffer before
        buffer = torch.full((format.nbytes,), old, dtype=torch.uint8)
        format.pack_(payloads, buffer)
        received = format.unpack(buffer)
        for own, sent, got in zip(announced, payloads, received, strict=True):
            for field, before, after in zip(own, sent, got, strict=True):
                if field.bits is None:
                    assert after.dtype == (dtype if field.dtype is None else field.dtype)
                    assert raw(after) == raw(before)
                else:
                    assert after.tolist() == before.tolist()


FLOATS, CODES = torch.zeros(3), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ((FLOATS,), "it has 1 fields and must have the 2"),
        ((FLOATS, CODES, CODES), "it has 3 fields and must have the 2"),
        ((FLOATS[:2], CODES), r"shape \[2\] and torch.float32 and must have shape \[3\]"),
        ((FLOATS.view(3, 1), CODES), r"shape \[3, 1\]"),
        ((FLOATS.double(), CODES), r"torch.float64 and must have shape \[3\] and torch.float32"),
        ((FLOATS.int(), CODES), r"torch.int32 and must have shape \[3\] and torch.float32"),
        ((FLOATS, CODES[:4]), r"shape \[4\] .* must have shape \[5\] and 6 bits"),
    ],
)
def test_a_payload_that_was_not_announced_is_refused(payload: Any, words: str) -> None:
    format = Format([(Field(3), Field(5, bits=6))])
    buffer = torch.zeros(format.nbytes, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"Invalid payload: .*{words}"):
        format.pack_([payload], buffer)
    format.pack_([(FLOATS, CODES)], buffer)
    with pytest.raises(ValueError, match="shorter"):  # a payload for each tensor
        format.pack_([], buffer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": -1}, "count of at least 0"),
        ({"count": 1, "bits": 0}, "1 to 32 bits"),
        ({"count": 1, "bits": 33}, "1 to 32 bits"),
        ({"count": 1, "bits": 8, "dtype": torch.uint8}, "a dtype or bits, not both"),
    ],
)
def test_impossible_fields_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid Field.*{words}"):
        Field(**options)


def test_positions_have_the_smallest_dtype_that_holds_them() -> None:
    assert position_dtype(1) == position_dtype(2**31) == torch.int32
    assert torch.iinfo(torch.int32).max == 2**31 - 1
    assert position_dtype(2**31 + 1) == torch.int64
