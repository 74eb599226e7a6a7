"""One end of a link: what it sends or receives in a step, message by message."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from efsgd.pipeline.codec import (
    Codec,
    MaskedCodec,
    Reader,
    compute_dtype,
    from_bytes,
    plain_reader,
    to_bytes,
)
from efsgd.pipeline.link import Link
from efsgd.pipeline.memory import DifferenceMemory, ErrorMemory, Memory, SampleMemory
from efsgd.pipeline.samples import SampleStore
from efsgd.randomness import Draws

# Numbers of random streams: rows of a message, messages of a step.
_ROWS, _CHUNKS = 1 << 24, 1 << 20


#: Which positions Top-K has sent forwards in this step, by microbatch and output.
Masks: TypeAlias = dict[tuple[int, int], Tensor]


#: Is shown what is handed to a send: which microbatch and output it is, the shape of the tensor,
#: the buffer that stands for it, and what reads the buffer.
EndListener: TypeAlias = Callable[[tuple[int, int], torch.Size, Tensor, Reader], None]


class End:
    """The sender or the receiver of a link between two stages.

    What is compressed is numbered by itself, since integers have no gradients: the first gradient
    then is that of the first activation.

    Attributes:
        sent: bytes that were handed to sends.
        plain: what they would have been uncompressed.
        listeners: are shown what is handed to sends.

    Args:
        link: what travels.
        number: of the link, for random numbers.
        name: of the link and this end of it, for files.
        masks: where a link with Top-K notes what it has sent, or reads it; None does neither.
    """

    def __init__(self, link: Link, number: int, name: str, masks: Masks | None = None) -> None:
        self.link, self.sent, self.plain = link, 0, 0
        self.listeners: list[EndListener] = []
        self._number, self._masks = number, masks
        self.codec: Codec | None = None
        self.memory: Memory | None = None
        if link.codes is not None:
            kind = MaskedCodec if link.reuse_mask else Codec
            self.codec = kind(link.codes, by_rows=link.per == "sample")
            self.memory = self._make_memory(self.codec, name)
            self._plain_memory = Memory(self.codec)
        # Messages under way: buffers must live, and received ones be decoded.
        self._flying: list[Tensor] = []
        self._expected: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.messages = 0

    def _make_memory(self, codec: Codec, name: str) -> Memory:
        link = self.link
        if link.memory == "samples":
            file = None if link.file is None else f"{link.file}.{name}"
            return SampleMemory(codec, SampleStore(link.capacity, file))
        kinds: dict[str, type[Memory]] = {"error": ErrorMemory, "difference": DifferenceMemory}
        return kinds.get(link.memory, Memory)(codec)

    def is_done(self, chunks: int) -> bool:
        """Whether messages of all microbatches, or of none, were handed over and received."""
        return self.messages in (0, chunks) and not self._expected

    def begin(self) -> None:
        """A step begins."""
        self._flying.clear()
        self._expected.clear()
        self.messages = 0

    def pack(
        self, ops: list[Any], chunk: int, step: int, *, trains: bool, scale: float
    ) -> list[Any]:
        """Sends of payloads in place of sends of tensors."""
        packed, number = [], 0
        self.messages += bool(ops)
        for output, op in enumerate(ops):
            tensor = op.tensor.detach()
            shape, dtype = tensor.shape, tensor.dtype
            if is_compressed := self._compresses(shape, dtype):
                x = tensor if scale == 1.0 else tensor.to(compute_dtype(dtype)) / scale
                draws, key = self._draws(chunk, number, step), (chunk, number)
                self._read_mask(key)
                buffer = self._memory(trains).encode(key, x, dtype, draws)
                self._note_mask(key, buffer, tensor)
                number += 1
            else:
                buffer = to_bytes(tensor)
            if self.listeners:
                read = plain_reader(shape, dtype)
                if is_compressed:
                    read = self._memory(trains).reader(key, shape, dtype, draws)
                for listener in self.listeners:
                    listener((chunk, output), shape, buffer, read)
            self._flying.append(buffer)
            self.sent += buffer.numel()
            self.plain += tensor.numel() * tensor.itemsize
            packed.append(dist.P2POp(op.op, buffer, op.peer, op.group, op.tag))
        return packed

    def expect(self, ops: list[Any], chunk: int, *, trains: bool) -> list[Any]:
        """Receives of payloads in place of receives of tensors."""
        self.messages += bool(ops)
        packed, places, number = [], [], 0
        for op in ops:
            shape, dtype = op.tensor.shape, op.tensor.dtype
            if self._compresses(shape, dtype):
                size = self._memory(trains).nbytes((chunk, number), shape, dtype)
                buffer = torch.empty(size, dtype=torch.uint8, device=op.tensor.device)
                number += 1
            else:
                buffer = to_bytes(op.tensor)  # its own memory, or other if it is not contiguous
            places.append((op.tensor, buffer))
            packed.append(dist.P2POp(op.op, buffer, op.peer, op.group, op.tag))
        self._expected[chunk] = places
        return packed

    @torch.no_grad()
    def unpack(self, chunk: int, step: int, *, trains: bool, scale: float) -> None:
        """Decodes what has arrived, into the very buffers that torch would have received into."""
        number = 0
        for place, buffer in self._expected.pop(chunk, ()):
            shape, dtype = place.shape, place.dtype
            if self._compresses(shape, dtype):
                draws, key = self._draws(chunk, number, step), (chunk, number)
                self._read_mask(key)
                found = self._memory(trains).decode(key, buffer, shape, dtype, draws)
                self._note_mask(key, buffer, place)
                number += 1
                place.detach().copy_(found if scale == 1.0 else found * scale)
            elif buffer.data_ptr() != place.data_ptr():
                place.detach().copy_(from_bytes(buffer, shape, dtype))

    def _read_mask(self, key: tuple[int, int]) -> None:
        if isinstance(self.codec, MaskedCodec) and self._masks is not None:
            self.codec.chosen = self._masks[key]

    def _note_mask(self, key: tuple[int, int], buffer: Tensor, like: Tensor) -> None:
        if self._masks is not None and self.codec is not None and not self.link.reuse_mask:
            self._masks[key] = self.codec.positions(buffer, like.shape, like.dtype)

    def _compresses(self, shape: torch.Size, dtype: torch.dtype) -> bool:
        return self.codec is not None and self.codec.compresses(shape, dtype)

    def _memory(self, trains: bool) -> Memory:
        assert self.memory is not None  # there is a codec
        return self.memory if trains else self._plain_memory

    def _draws(self, chunk: int, output: int, step: int) -> Any:
        seed = getattr(self.link.compressor, "seed", 0)

        def draws(row: int, is_private: bool) -> Draws:
            index = (self._number * 64 + output) * _ROWS + row
            return Draws(seed, index, step * _CHUNKS + chunk, 0 if is_private else None)

        return draws

    def describe(self) -> list[str]:
        """What must be the same at both ends."""
        lines = [f"{dataclasses.replace(self.link, file=None)!r}"]  # each has a file of its own
        if self.memory is not None and self.memory.is_shared:
            lines.append(f"memory {self.memory.digest():x}")
        return lines
