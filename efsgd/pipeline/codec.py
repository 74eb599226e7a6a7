"""Tensors as payloads: what a link hands to the wire, in one buffer of bytes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

from efsgd.algorithms.operators import ELEMENTS_AT_ONCE
from efsgd.algorithms.reading import Reading, entries, in_clear, joined
from efsgd.compressors import TensorCompressor
from efsgd.randomness import RowDraws
from efsgd.wire.payload import Format

#: Random numbers for some rows, on one worker or (False) on both.
DrawsOf: TypeAlias = Callable[[Sequence[int], bool], RowDraws]

#: What the buffer of a message says.
Reader: TypeAlias = Callable[[Tensor], Reading]


def to_bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor, [nbytes] uint8."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    return plain.contiguous().view(-1).view(torch.uint8)


def from_bytes(buffer: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The tensor whose memory it is."""
    return buffer.view(dtype).view(shape)


def plain_reader(shape: torch.Size, dtype: torch.dtype) -> Reader:
    """Reads the memory of a tensor."""
    return lambda buffer: in_clear(from_bytes(buffer, shape, dtype))


class Codec:
    """Compresses tensors of any shape, each row by itself or all of them together.

    What is not finite is sent as bits that are all ones, and decodes to NaN. No payload with finite
    floating-point numbers is like that; one without any has a byte of zeros besides.

    Args:
        compressor: of rows.
        by_rows: whether rows are compressed one by one.
    """

    def __init__(self, compressor: TensorCompressor, *, by_rows: bool) -> None:
        self._compressor, self._by_rows = compressor, by_rows
        self._formats = lru_cache(maxsize=64)(self._format)

    def compresses(self, shape: torch.Size, dtype: torch.dtype) -> bool:
        """Whether a tensor is compressed; otherwise it goes as it is."""
        if not dtype.is_floating_point or len(shape) == 0 or shape.numel() == 0:
            return False
        if not self._compressor.compresses(self._rows(shape)[1]):
            return False
        # Of this class: where positions did not travel forwards, there are none to reuse.
        return Codec.nbytes(self, shape, dtype) < shape.numel() * dtype.itemsize

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """The size of a payload."""
        return self._formats(shape, compute_dtype(dtype)).nbytes + self._has_only_codes(shape)

    def encode(self, x: Tensor, draws: DrawsOf) -> Tensor:
        """The payload of a tensor that is compressed, [nbytes] uint8."""
        x = x.detach().to(compute_dtype(x.dtype)).contiguous()
        form = self._formats(x.shape, x.dtype)
        buffer = torch.zeros(self.nbytes(x.shape, x.dtype), dtype=torch.uint8, device=x.device)
        if not bool(x.isfinite().all()):
            return buffer.fill_(255)
        count, own = self._rows(x.shape)
        rows = x.view(count, *own)
        payload = buffer[: form.nbytes]
        if self._together(x.shape):
            parts = [
                self._compressor.compress_rows(rows[some.start : some.stop], draws(some, True))
                for some in _runs(count, own)
            ]
            form.pack_([[torch.cat(field).view(-1) for field in zip(*parts, strict=True)]], payload)
        else:
            every = draws(range(count), True)
            form.pack_(
                [self._compressor.compress(rows[n], every[n]) for n in range(count)], payload
            )
        return buffer

    def decode(
        self, buffer: Tensor, shape: torch.Size, dtype: torch.dtype, draws: DrawsOf
    ) -> Tensor:
        """What a payload decodes to, float32 or float64."""
        count, own = self._rows(shape)
        out = torch.zeros((count, *own), dtype=compute_dtype(dtype), device=buffer.device)
        if bool((buffer == 255).all()):
            return out.fill_(torch.nan).view(shape)
        form = self._formats(shape, out.dtype)
        payloads = form.unpack(buffer[: form.nbytes])
        if self._together(shape):
            fields = [field.view(count, -1) for field in payloads[0]]
            for some in _runs(count, own):
                part = slice(some.start, some.stop)
                sent = [field[part] for field in fields]
                self._compressor.add_decompressed_rows_(out[part], sent, draws(some, False), 1.0)
        else:
            every = draws(range(count), False)
            for n, payload in enumerate(payloads):
                self._compressor.add_decompressed_(out[n], payload, every[n], 1.0)
        return out.view(shape)

    def reader(self, shape: torch.Size, dtype: torch.dtype, draws: DrawsOf) -> Reader:
        """Reads the payload of a tensor of this shape, for somebody who sees it."""
        form, (count, own) = self._formats(shape, compute_dtype(dtype)), self._rows(shape)
        places = [(n,) for n in range(count)] if len(own) < len(shape) else [()]

        def read(buffer: Tensor) -> Reading:
            whole, rows = self.decode(buffer, shape, dtype, draws), []
            every = draws(range(count), False)
            payloads = form.unpack(buffer[: form.nbytes])
            if self._together(shape):
                fields = [field.view(count, -1) for field in payloads[0]]
                payloads = [tuple(field[n] for field in fields) for n in range(count)]
            for n, payload in enumerate(payloads):
                rows.append(self._compressor.read(payload, whole[places[n]], every[n]))
            return joined(rows, places, whole)

        return read

    def positions(self, buffer: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Where a message of Top-K has its values, [rows, k] int64."""
        payloads = self._formats(shape, compute_dtype(dtype)).unpack(buffer)
        count, own = self._rows(shape)
        found = torch.cat([positions for _, positions in payloads]).long().view(count, -1)
        return found.clamp_(0, own.numel() - 1)  # of NaN there are none

    def _format(self, shape: torch.Size, dtype: torch.dtype) -> Format:
        count, own = self._rows(shape)
        fields = tuple(self._compressor.fields(own))
        if self._together(shape):  # fields of one kind lie together: those are the same bytes
            return Format([[replace(each, count=count * each.count) for each in fields]], dtype)
        return Format([fields] * count, dtype)

    def _together(self, shape: torch.Size) -> bool:
        """Whether rows are compressed in one call. One row is not: it may be long."""
        count, own = self._rows(shape)
        return count > 1 and self._compressor.takes_rows(own)

    def _has_only_codes(self, shape: torch.Size) -> bool:
        """Whether there are no floating-point numbers in a payload."""
        kinds = (
            field.dtype
            for field in self._compressor.fields(self._rows(shape)[1])
            if field.bits is None and field.count > 0
        )
        return all(kind is not None and not kind.is_floating_point for kind in kinds)

    def _rows(self, shape: torch.Size) -> tuple[int, torch.Size]:
        """How many are compressed by themselves, and the shape of each."""
        by_rows = self._by_rows and len(shape) > 1
        return (shape[0], shape[1:]) if by_rows else (1, shape)


class MaskedCodec(Codec):
    """Values at positions that both ends know, since Top-K has sent them the other way.

    Attributes:
        chosen: positions of the tensor that comes next, [rows, k].
    """

    chosen: Tensor

    def nbytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        count, own = self._rows(shape)
        k = self._compressor.fields(own)[0].count
        return count * k * compute_dtype(dtype).itemsize

    def encode(self, x: Tensor, draws: DrawsOf) -> Tensor:
        x = x.detach().to(compute_dtype(x.dtype)).contiguous()
        values = x.view(len(self.chosen), -1).gather(1, self.chosen)
        if not bool(x.isfinite().all()):  # elsewhere perhaps, and nobody would know
            values.fill_(torch.nan)
        return to_bytes(values)

    def decode(
        self, buffer: Tensor, shape: torch.Size, dtype: torch.dtype, draws: DrawsOf
    ) -> Tensor:
        return self._decode(buffer, shape, dtype, self.chosen)

    @staticmethod
    def _decode(buffer: Tensor, shape: torch.Size, dtype: torch.dtype, chosen: Tensor) -> Tensor:
        kind = compute_dtype(dtype)
        out = torch.zeros(shape, dtype=kind, device=buffer.device).view(len(chosen), -1)
        values = buffer.view(kind).view_as(chosen)
        if bool(values.isnan().all()):
            return out.fill_(torch.nan).view(shape)
        return out.scatter_(1, chosen, values).view(shape)

    def reader(self, shape: torch.Size, dtype: torch.dtype, draws: DrawsOf) -> Reader:
        chosen, (count, own) = self.chosen, self._rows(shape)
        first = torch.arange(count, device=chosen.device).unsqueeze(-1) * own.numel()

        def read(buffer: Tensor) -> Reading:
            return entries(self._decode(buffer, shape, dtype, chosen), (first + chosen).view(-1))

        return read


def _runs(count: int, own: torch.Size) -> list[range]:
    """Rows of a shape, so many at once that they stay in the cache between operations."""
    size = max(1, ELEMENTS_AT_ONCE // own.numel())
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of compression and memories."""
    return torch.float64 if dtype == torch.float64 else torch.float32
