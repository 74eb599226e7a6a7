"""What compressors that are not averaged hand over: typed fields, in one buffer of bytes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.wire.bits import MAX_BITS, pack, packed_size, unpack


def position_dtype(numel: int) -> torch.dtype:
    """The smallest dtype of positions in a tensor: int32, from 2**31 elements on int64.

    Example:
        >>> from efsgd.wire.payload import position_dtype
        >>> position_dtype(2**31), position_dtype(2**31 + 1)
        (torch.int32, torch.int64)
    """
    return torch.int32 if numel <= 2**31 else torch.int64


@dataclass(frozen=True)
class Field:
    """One part of the payload of a tensor, announced: it is the same in every step.

    Attributes:
        count: the number of elements.
        dtype: of the elements; None is that of the deltas, float32 or float64.
        bits: in place of a dtype, elements are codes from 0 to 2**bits - 1 (bool for one bit),
            packed without gaps.
    """

    count: int
    dtype: torch.dtype | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.count < 0 or (self.bits is not None and not 1 <= self.bits <= MAX_BITS):
            raise ValueError(
                f"Invalid {self}: must have a count of at least 0, and 1 to {MAX_BITS} bits."
            )
        if self.bits is not None and self.dtype is not None:
            raise ValueError(f"Invalid {self}: must have a dtype or bits, not both.")


@dataclass(frozen=True)
class _Region:
    """Where all elements of one kind lie: those of a dtype, or codes of so many bits."""

    dtype: torch.dtype
    bits: int | None
    first: int
    nbytes: int
    counts: tuple[int, ...]


class Format:
    """Where each field of each tensor lies in a buffer of `nbytes` bytes.

    Fields of one kind lie together, larger elements first, and packed codes of one width follow
    each other without gaps, over all tensors; they end at a multiple of four bytes. `dtype` is that
    of values without one of their own.

    Example:
        >>> from efsgd.wire.payload import Field, Format
        >>> format = Format([(Field(5, bits=1), Field(1)), (Field(30, bits=1), Field(1))])
        >>> format.nbytes  # 35 bits in two words, and two values
        16
    """

    def __init__(
        self, fields: Sequence[Sequence[Field]], dtype: torch.dtype = torch.float32
    ) -> None:
        self._fields = [
            [
                (field.count, dtype if field.dtype is None else field.dtype, field.bits)
                for field in own
            ]
            for own in fields
        ]
        kinds: dict[tuple[torch.dtype, int | None], list[int]] = {}
        for count, own_dtype, bits in itertools.chain(*self._fields):
            kinds.setdefault(_kind(own_dtype, bits), []).append(count)
        # Everything then begins at a multiple of its own size.
        ordered = sorted(kinds, key=lambda kind: (kind[1] is not None, -kind[0].itemsize))
        self._regions: dict[tuple[torch.dtype, int | None], _Region] = {}
        first = 0
        for kind in ordered:
            own_dtype, bits = kind
            total = sum(kinds[kind])
            nbytes = total * own_dtype.itemsize
            if bits is not None:
                first += -first % 4
                nbytes = packed_size(total, bits)
                nbytes += -nbytes % 4
            self._regions[kind] = _Region(own_dtype, bits, first, nbytes, tuple(kinds[kind]))
            first += nbytes
        self.nbytes = first

    def pack_(self, payloads: Sequence[Sequence[Tensor]], buffer: Tensor) -> None:
        """Writes the payloads of all tensors, in the order of their fields, into [nbytes] uint8.

        A payload that is not what was announced is a ValueError. Codes may have any integer dtype.
        """
        parts: dict[tuple[torch.dtype, int | None], list[Tensor]] = {k: [] for k in self._regions}
        for announced, payload in zip(self._fields, payloads, strict=True):
            require_tensors(payload)
            if len(payload) != len(announced):
                raise ValueError(
                    f"Invalid payload: it has {len(payload)} fields and must have the "
                    f"{len(announced)} that the compressor's `fields` announce."
                )
            for (count, dtype, bits), value in zip(announced, payload, strict=True):
                if value.shape != (count,) or (bits is None and value.dtype != dtype):
                    what = f"{bits} bits" if bits is not None else str(dtype)
                    raise ValueError(
                        f"Invalid payload: a field has shape {list(value.shape)} and {value.dtype} "
                        f"and must have shape [{count}] and {what}, as the compressor's `fields` "
                        f"announce."
                    )
                parts[_kind(dtype, bits)].append(value)
        for kind, region in self._regions.items():
            place = buffer[region.first : region.first + region.nbytes]
            joined = torch.cat(parts[kind]) if len(parts[kind]) > 1 else parts[kind][0]
            if region.bits is None:
                place.view(region.dtype).copy_(joined)
            else:
                packed = pack(joined, region.bits)
                place[: len(packed)] = packed
                place[len(packed) :] = 0

    def unpack(self, buffer: Tensor) -> list[tuple[Tensor, ...]]:
        """The payloads in a buffer, [nbytes] uint8, of any worker; parts of it, or made from it."""
        if buffer.storage_offset() % 8 != 0:
            buffer = buffer.clone()  # so that eight bytes can be read at a time
        parts = {}
        for kind, region in self._regions.items():
            place = buffer[region.first : region.first + region.nbytes]
            if region.bits is None:
                joined = place.view(region.dtype)
            else:
                total = sum(region.counts)
                joined = unpack(place[: packed_size(total, region.bits)], total, region.bits)
            parts[kind] = iter(joined.split(list(region.counts)))
        return [
            tuple(next(parts[_kind(dtype, bits)]) for _, dtype, bits in announced)
            for announced in self._fields
        ]


def require_tensors(payload: object) -> None:
    """Raises TypeError unless it is a tuple or list of tensors."""
    if not isinstance(payload, tuple | list) or not all(isinstance(p, Tensor) for p in payload):
        raise TypeError(
            f"Invalid payload: {type(payload).__name__}. A compressor's `compress` must return a "
            f"tuple of tensors, one for each field."
        )


def _kind(dtype: torch.dtype, bits: int | None) -> tuple[torch.dtype, int | None]:
    return (torch.uint8 if bits is not None else dtype, bits)
