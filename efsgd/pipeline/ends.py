"""One end of a link: what it sends or receives in a step, message by message."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from efsgd.pipeline.codec import (
    Codec,
    DrawsOf,
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
from efsgd.randomness import RowDraws
from efsgd.wire.collectives import leave_modes

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
        description: what must be the same at both ends.
        sent: bytes that were handed to sends.
        plain: what they would have been uncompressed.
        listeners: are shown what is handed to sends.

    Args:
        link: what travels.
        number: of the link, for random numbers; each replica of a pipeline has others.
        name: of this end, for errors and files.
        masks: where a link with Top-K notes what it has sent, or reads it; None does neither.
    """

    def __init__(self, link: Link, number: int, name: str, masks: Masks | None = None) -> None:
        self.link, self.sent, self.plain = link, 0, 0
        self.listeners: list[EndListener] = []
        self._number, self._name, self._masks = number, name, masks
        self.codec: Codec | None = None
        self.memory: Memory | None = None
        if link.codes is not None:
            kind = MaskedCodec if link.reuse_mask else Codec
            self.codec = kind(link.codes, by_rows=link.per == "sample")
            self.memory = self._make_memory(self.codec)
            self._plain_memory = Memory(self.codec, name)
        self.description = self._describe()
        # Messages under way: buffers must live, and received ones be decoded.
        self._flying: list[Tensor] = []
        self._expected: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._agreed: dict[int, tuple[torch.Size, torch.dtype]] = {}
        self._messages = self._step = 0

    def _make_memory(self, codec: Codec) -> Memory:
        link, name = self.link, self._name
        if link.memory == "samples":
            suffix = name.replace(", ", ".").replace(" ", "-")
            file = None if link.file is None else f"{link.file}.{suffix}"
            return SampleMemory(codec, name, SampleStore(link.capacity, file))
        kinds: dict[str, type[Memory]] = {"error": ErrorMemory, "difference": DifferenceMemory}
        return kinds.get(link.memory, Memory)(codec, name)

    # ---- between steps --------------------------------------------------------------------------

    def is_done(self, chunks: int) -> bool:
        """Whether messages of all microbatches, or of none, were handed over and received."""
        return self._messages in (0, chunks) and not self._expected

    @leave_modes()
    def settle(self, *, is_kept: bool) -> None:
        """Keeps what the last step has changed, or nothing of it."""
        if self.memory is not None:
            (self.memory.commit if is_kept else self.memory.discard)()

    def begin(self, step: int) -> None:
        """A step begins, of which both ends have the same number."""
        self._flying.clear()
        self._expected.clear()
        self._messages, self._step = 0, step

    def forget_shapes(self) -> None:
        """Torch has made new buffers to receive into, of the shapes of what comes next."""
        self._agreed.clear()

    @leave_modes()
    def load(self, state: Mapping[str, Any], step: int, device: torch.device) -> None:
        """Keeps what the memory's `state` has returned after a step."""
        if self.memory is not None:
            self.memory.load(state, device)
            is_shared = self.memory.is_shared
            memory = f", memory {self.memory.digest():x}" if is_shared else ""
            self.description = f"{self._describe()}, loaded after step {step}{memory}"

    def _describe(self) -> str:
        """The link; each end has a file of its own, and Identity does what None does."""
        return repr(dataclasses.replace(self.link, compressor=self.link.codes, file=None))

    # ---- in a step ------------------------------------------------------------------------------

    @leave_modes()
    def pack(self, ops: list[Any], chunk: int, *, trains: bool, scale: float) -> list[Any]:
        """Sends of payloads in place of sends of tensors."""
        self._require_masks(chunk, ops)
        packed, number = [], 0
        for output, op in enumerate(ops):
            tensor = op.tensor.detach()
            shape, dtype = tensor.shape, tensor.dtype
            self._require_agreed(chunk, output, tensor)
            if is_compressed := self._compresses(shape, dtype):
                x = tensor if scale == 1.0 else tensor.to(compute_dtype(dtype)) / scale
                draws, key = self._draws(chunk, number), (chunk, number)
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
        self._messages += bool(ops)
        return packed

    def expect(self, ops: list[Any], chunk: int, *, trains: bool) -> list[Any]:
        """Receives of payloads in place of receives of tensors."""
        self._require_masks(chunk, ops)
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
        self._messages += bool(ops)
        self._expected[chunk] = places
        return packed

    @leave_modes()
    def unpack(self, chunk: int, *, trains: bool, scale: float) -> None:
        """Decodes what has arrived, into the very buffers that torch would have received into."""
        number = 0
        for place, buffer in self._expected.pop(chunk, ()):
            shape, dtype = place.shape, place.dtype
            if self._compresses(shape, dtype):
                draws, key = self._draws(chunk, number), (chunk, number)
                self._read_mask(key)
                found = self._memory(trains).decode(key, buffer, shape, dtype, draws)
                self._note_mask(key, buffer, place)
                number += 1
                found = found if scale == 1.0 else found * scale
            elif buffer.data_ptr() != place.data_ptr():
                found = from_bytes(buffer, shape, dtype)
            else:
                continue
            with torch.inference_mode(place.is_inference()):  # only there it can be written to
                place.detach().copy_(found)

    def _require_agreed(self, chunk: int, output: int, tensor: Tensor) -> None:
        """The receiver has buffers for tensors like those of the first microbatch."""
        own = tensor.shape, tensor.dtype
        agreed = self._agreed.setdefault(output, own)
        if self.codec is not None and own != agreed:
            raise ValueError(
                f"Microbatch {chunk} of {self._name} has a tensor {list(own[0])} of {own[1]}, and "
                f"the first that was sent had {list(agreed[0])} of {agreed[1]}: a schedule expects "
                f"microbatches of one size. Let the batch be a multiple of their number, leave out "
                f"a smaller last batch (drop_last=True), or make a new schedule for it."
            )

    def _require_masks(self, chunk: int, ops: Sequence[Any]) -> None:
        """Masks of outputs and their gradients are matched by their order."""
        if not ops or self._masks is None or not isinstance(self.codec, MaskedCodec):
            return
        count = sum(self._compresses(op.tensor.shape, op.tensor.dtype) for op in ops)
        known = sum(own == chunk for own, _ in self._masks)
        if count != known:
            raise ValueError(
                f"{self._name}: {count} gradients for {known} outputs that were compressed. With "
                f"reuse_mask=True each of those must have a gradient: let the stage give them as "
                f"integers or leave them out, or use reuse_mask=False."
            )

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

    def _draws(self, chunk: int, output: int) -> DrawsOf:
        seed, step = getattr(self.link.compressor, "seed", 0), self._step * _CHUNKS + chunk

        first = (self._number * 64 + output) * _ROWS

        def draws(rows: Sequence[int], is_private: bool) -> RowDraws:
            indices = tuple([first + row for row in rows])
            return RowDraws(seed, indices, step, 0 if is_private else None)

        return draws


def listen(ends: Mapping[str, End], show: Callable[..., None]) -> Callable[[], None]:
    """Has senders show what they send, by name, until the function that is returned is called."""
    undo = []
    for direction in ("activations", "gradients"):

        def listener(place: tuple[int, int], *message: Any, direction: str = direction) -> None:
            show(f"{direction}, microbatch {place[0]}, output {place[1]}", *message)

        listeners = ends[f"{direction} sent"].listeners
        listeners.append(listener)
        undo.append(partial(listeners.remove, listener))

    def end() -> None:
        for each in undo:
            each()

    return end
