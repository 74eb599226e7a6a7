"""Codes of any number of bits, packed without gaps: what is sent of them.

All of it is a few operations on whole tensors. Codes are laid out from the lowest bit of the first
byte on, so that eight codes of b bits are b bytes.
"""

import functools

import torch
from torch import Tensor

from efsgd.layout import is_fake

#: The most that a code may have.
MAX_BITS = 32

# By the bits of a code: integers that are as large as eight codes together.
_EIGHT_CODES = {2: torch.int16, 4: torch.int32}


def packed_size(count: int, bits: int) -> int:
    """The number of bytes that `count` codes of `bits` bits take.

    Example:
        >>> from efsgd.wire.bits import packed_size
        >>> packed_size(11, 3)
        5
    """
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes, [count] bool or integers from 0 to 2**bits - 1, each in `bits` bits, 1 to 32.

    Returns [packed_size(count, bits)] uint8.

    Example:
        >>> from efsgd.wire.bits import pack, unpack
        >>> packed = pack(torch.tensor([1, 7, 0, 5]), bits=3)
        >>> packed.tolist(), unpack(packed, 4, bits=3).tolist()
        ([57, 10], [1, 7, 0, 5])
    """
    _validate(bits)
    if bits == 8:
        return codes.to(torch.uint8)
    count = len(codes)
    if bits > 8:  # the lowest bytes of all codes, then those above them, and so on
        wide = codes.contiguous() if 8 * codes.dtype.itemsize >= bits else codes.long()
        bytes_ = wide.view(torch.uint8).view(count, wide.dtype.itemsize)
        widths = _widths(bits)
        return torch.cat([pack(bytes_[:, byte], width) for byte, width in enumerate(widths)])
    if bits == 1:
        # Eight bytes that are 0 or 1 are one word; this product has their sum, each shifted to a
        # bit of its own, in its highest byte.
        words = _padded(codes.to(torch.uint8), 8).view(torch.int64)
        return ((words * 0x0102040810204080) >> 56).to(torch.uint8)
    words = _padded(codes.to(torch.uint8), 8).view(torch.int64).clone()  # a code in each byte
    for lane in (8, 16, 32):
        width = bits * lane // 8  # of what is in use of each lane, at its lower end
        upper = (words >> lane).bitwise_and_(_in_every_second(lane, width))
        words.sub_(upper, alpha=(1 << lane) - (1 << width))
    if bits in _EIGHT_CODES:
        return words.to(_EIGHT_CODES[bits]).view(torch.uint8)[: packed_size(count, bits)]
    return words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)[: packed_size(count, bits)]


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """What was packed: [count] bool for 1 bit, uint8 up to 8, int32 up to 31, int64 for 32."""
    _validate(bits)
    if bits == 8:
        return packed.clone()
    if bits > 8:
        dtype = torch.int32 if bits < 32 else torch.int64
        codes = torch.zeros(count, dtype=dtype, device=packed.device)
        bytes_ = codes.view(torch.uint8).view(count, dtype.itemsize)
        for byte, width in enumerate(_widths(bits)):
            size = packed_size(count, width)
            bytes_[:, byte] = unpack(packed[:size], count, width)
            packed = packed[size:]
        return codes
    if bits == 1:
        spread = _spread_bytes.__wrapped__ if is_fake(packed) else _spread_bytes
        words = spread(packed.device)[packed.long()]
        return words.view(torch.bool)[:count]
    groups = _padded(packed, bits).view(-1, bits)
    words = torch.zeros(len(groups), dtype=torch.int64, device=packed.device)
    words.view(torch.uint8).view(-1, 8)[:, :bits] = groups
    for lane in (32, 16, 8):
        width = bits * lane // 8
        upper = (words >> width).bitwise_and_(_in_every_second(lane, width))
        words.add_(upper, alpha=(1 << lane) - (1 << width))
    return words.view(torch.uint8)[:count]


def _validate(bits: int) -> None:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"Invalid bits: {bits}. Must be from 1 to {MAX_BITS}.")


def _widths(bits: int) -> list[int]:
    """How many bits of each of its bytes a code has, the lowest byte first."""
    return [min(8, bits - first) for first in range(0, bits, 8)]


def _in_every_second(lane: int, width: int) -> int:
    """`width` bits at the lower end of every second lane of a word of 64 bits."""
    return sum(((1 << width) - 1) << first for first in range(0, 64, 2 * lane))


def _padded(values: Tensor, multiple: int) -> Tensor:
    """With zeros at the end, up to a multiple, and aligned as a fresh tensor is."""
    missing = -len(values) % multiple
    is_aligned = values.is_contiguous() and (is_fake(values) or values.data_ptr() % 8 == 0)
    if missing == 0 and is_aligned and values.storage_offset() % 8 == 0:
        return values
    padded = values.new_zeros(len(values) + missing)
    padded[: len(values)] = values
    return padded


@functools.cache
def _spread_bytes(device: torch.device) -> Tensor:
    """For each byte, the word whose eight bytes are its bits: [256] int64."""
    shifts = torch.arange(8, device="cpu")
    bits = (torch.arange(256, device="cpu").unsqueeze(-1) >> shifts) & 1
    return (bits << (8 * shifts)).sum(dim=-1).to(device)


def majority(ballots: Tensor) -> tuple[Tensor, Tensor]:
    """For each bit of `ballots`, [voters, count], whether more have it set than not, and as many.

    Example:
        >>> from efsgd.wire.bits import majority
        >>> more, as_many = majority(torch.tensor([[0b1100], [0b1010]]))
        >>> f"{more.item():04b} {as_many.item():04b}"
        '1000 0110'
    """
    voters = len(ballots)
    planes: list[Tensor] = []  # of the counts: ones, twos, fours, ...
    for ballot in ballots:
        carry = ballot
        for position, plane in enumerate(planes):
            planes[position], carry = plane ^ carry, plane & carry
        if len(planes) < voters.bit_length():
            planes.append(carry)
    half = voters // 2
    more = torch.zeros_like(ballots[0])
    equal = ~more
    for position, plane in reversed(list(enumerate(planes))):
        if half >> position & 1:
            equal = equal & plane
        else:
            more, equal = more | (equal & plane), equal & ~plane
    return more, equal if voters % 2 == 0 else torch.zeros_like(equal)
