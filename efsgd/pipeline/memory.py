"""What the ends of a link keep between steps. What a step changes counts once both agree on it."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from efsgd.algorithms.reading import Reading, in_clear, joined
from efsgd.pipeline.codec import Codec, DrawsOf, compute_dtype, from_bytes, to_bytes
from efsgd.pipeline.samples import SampleStore
from efsgd.wire.compare import checksum, digest_of

#: A microbatch and an output of the stage.
Key: TypeAlias = tuple[int, int]


class Memory:
    """No memory: tensors are compressed as they are. Others begin from here.

    Attributes:
        is_shared: whether both ends keep the same.

    Args:
        codec: of what travels.
        name: of the end, for errors.
    """

    is_shared = False

    def __init__(self, codec: Codec, name: str) -> None:
        self._codec, self._name = codec, name

    def nbytes(self, key: Key, shape: torch.Size, dtype: torch.dtype) -> int:
        """The size of the next message."""
        return self._codec.nbytes(shape, dtype)

    def encode(self, key: Key, x: Tensor, dtype: torch.dtype, draws: DrawsOf) -> Tensor:
        """The message for a tensor, which is to arrive in a dtype that may not be its own."""
        return self._codec.encode(x, draws)

    def decode(
        self, key: Key, buffer: Tensor, shape: torch.Size, dtype: torch.dtype, draws: DrawsOf
    ) -> Tensor:
        """The tensor that a message stands for."""
        return self._codec.decode(buffer, shape, dtype, draws)

    def reader(
        self, key: Key, shape: torch.Size, dtype: torch.dtype, draws: DrawsOf
    ) -> Callable[[Tensor], Reading]:
        """Reads the message of the present step, of what was compressed: less or more than x."""
        return self._codec.reader(shape, dtype, draws)

    def commit(self) -> None:
        """What the last step has changed is kept."""

    def discard(self) -> None:
        """Nothing of it is kept."""

    def state(self) -> dict[str, Any]:
        """What is kept, and what the last step has changed, as plain data and tensors."""
        return {}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Keeps copies of what `state` has returned."""

    def digest(self) -> int:
        """The same for ends with the same state."""
        return 0

    def _require_same(self, what: str, kept: Sequence[int], given: Sequence[int]) -> None:
        if tuple(kept) != tuple(given):
            raise ValueError(
                f"Memory of {self._name}: {what} has shape {list(given)}, and what is kept of it "
                f"has {list(kept)}. Give all steps of one schedule's stages the same shapes, make "
                f"new stages for others, or use memory='none'."
            )


class _MicrobatchMemory(Memory):
    """One tensor for each microbatch and output."""

    def __init__(self, codec: Codec, name: str) -> None:
        super().__init__(codec, name)
        self._kept: dict[Key, Tensor] = {}
        self._new: dict[Key, Tensor] = {}

    def _before(self, key: Key, shape: torch.Size) -> Tensor | None:
        """What is kept."""
        found = self._kept.get(key)
        if found is not None:
            self._require_same(f"microbatch {key[0]}, output {key[1]}", found.shape, shape)
        return found

    def commit(self) -> None:
        self._kept |= self._new
        self._new = {}

    def discard(self) -> None:
        self._new = {}

    def state(self) -> dict[str, Any]:
        found = self._kept | self._new
        return {"keys": list(found), "values": list(found.values())}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        values = (value.to(device, copy=True) for value in state["values"])
        self._kept = dict(zip(map(tuple, state["keys"]), values, strict=True))
        self._new = {}

    def digest(self) -> int:
        found = [(key, checksum(value)) for key, value in sorted((self._kept | self._new).items())]
        return digest_of(repr(found).encode())


class ErrorMemory(_MicrobatchMemory):
    """EF: the sender adds what it has not sent of the same microbatch in the last step."""

    def encode(self, key: Key, x: Tensor, dtype: torch.dtype, draws: DrawsOf) -> Tensor:
        delta, before = x.to(compute_dtype(x.dtype)), self._before(key, x.shape)
        if before is not None:
            delta = delta + before
        buffer = self._codec.encode(delta, draws)
        error = delta - self._codec.decode(buffer, x.shape, x.dtype, draws)
        if bool(error.isfinite().all()):
            self._new[key] = error
        return buffer


class DifferenceMemory(_MicrobatchMemory):
    """EF21: both ends keep what has been sent of a microbatch, and the rest travels."""

    is_shared = True

    def nbytes(self, key: Key, shape: torch.Size, dtype: torch.dtype) -> int:
        self._before(key, shape)  # an error at both ends, before anything is sent
        return super().nbytes(key, shape, dtype)

    def encode(self, key: Key, x: Tensor, dtype: torch.dtype, draws: DrawsOf) -> Tensor:
        delta, before = x.to(compute_dtype(x.dtype)), self._before(key, x.shape)
        if before is not None:
            delta = delta - before
        buffer = self._codec.encode(delta, draws)
        self.decode(key, buffer, x.shape, dtype, draws)
        return buffer

    def decode(
        self, key: Key, buffer: Tensor, shape: torch.Size, dtype: torch.dtype, draws: DrawsOf
    ) -> Tensor:
        sent, before = self._codec.decode(buffer, shape, dtype, draws), self._before(key, shape)
        if before is not None:
            sent = sent + before
        if bool(sent.isfinite().all()):
            self._new[key] = sent
        return sent


class SampleMemory(Memory):
    """AQ-SGD: both ends keep what has been sent of a sample, whose first visit goes whole."""

    is_shared = True

    def __init__(self, codec: Codec, name: str, store: SampleStore) -> None:
        super().__init__(codec, name)
        self._store = store
        self._new: dict[tuple[int, int], Tensor] = {}  # by sample and output
        self._ids: list[list[int]] = []

    def announce(self, ids: list[list[int]]) -> None:
        """Which samples the microbatches of the next step have.

        Raises:
            ValueError: there is no room for them.
        """
        self._store.require_room(itertools.chain(*ids))
        self._ids = ids

    def _before(self, ids: list[int], output: int, like: Tensor) -> Tensor:
        """What is kept of samples that are known, in the shape and on the device of a tensor."""
        return self._store.get(ids, output).to(like.device).view_as(like)

    def _split(
        self, key: Key, shape: torch.Size, dtype: torch.dtype
    ) -> tuple[list[int], list[int], list[int]]:
        """Ids of a microbatch, and the rows of those that go whole, and of those that are known."""
        ids, count = self._ids[key[0]], shape[0]
        if len(ids) != count:
            raise ValueError(
                f"{len(ids)} samples were announced for a microbatch of {count}. Announce those of "
                f"the whole batch, in its order, with the schedule's number of microbatches."
            )
        known = [row for row, sample in enumerate(ids) if self._store.has(sample, key[1])]
        if known:
            kept = self._store.numel(key[1])
            self._require_same(f"a sample of output {key[1]}", [kept], [shape[1:].numel()])
        if not self._codec.compresses(torch.Size((len(known), *shape[1:])), dtype):
            known = []  # so few that their payload would not be smaller
        return ids, sorted(set(range(count)) - set(known)), known

    def nbytes(self, key: Key, shape: torch.Size, dtype: torch.dtype) -> int:
        _, new, known = self._split(key, shape, dtype)
        whole = len(new) * shape[1:].numel() * dtype.itemsize
        coded = torch.Size((len(known), *shape[1:]))
        return whole + (self._codec.nbytes(coded, dtype) if known else 0)

    def encode(self, key: Key, x: Tensor, dtype: torch.dtype, draws: DrawsOf) -> Tensor:
        x = x.to(compute_dtype(x.dtype))
        ids, new, known = self._split(key, x.shape, dtype)
        parts = [to_bytes(x[new].to(dtype))] if new else []
        if known:
            rest = x[known]
            rest = rest - self._before([ids[row] for row in known], key[1], rest)
            parts.append(self._codec.encode(rest, draws))
        buffer = torch.cat(parts)
        self.decode(key, buffer, x.shape, dtype, draws)
        return buffer

    def decode(
        self, key: Key, buffer: Tensor, shape: torch.Size, dtype: torch.dtype, draws: DrawsOf
    ) -> Tensor:
        ids, new, known = self._split(key, shape, dtype)
        own, kind = shape[1:], compute_dtype(dtype)
        result = torch.empty(shape, dtype=kind, device=buffer.device)
        head = len(new) * own.numel() * dtype.itemsize
        if new:
            whole = from_bytes(buffer[:head].clone(), torch.Size((len(new), *own)), dtype)
            result[new] = whole.to(kind)
        if known:
            coded = torch.Size((len(known), *own))
            change = self._codec.decode(buffer[head:].clone(), coded, dtype, draws)
            before = self._before([ids[row] for row in known], key[1], change)
            result[known] = before + change
        for row, sample in enumerate(ids):
            if bool(result[row].isfinite().all()):
                self._new[sample, key[1]] = result[row].flatten()
        return result

    def reader(
        self, key: Key, shape: torch.Size, dtype: torch.dtype, draws: DrawsOf
    ) -> Callable[[Tensor], Reading]:
        _, new, known = self._split(key, shape, dtype)
        own, coded = shape[1:], torch.Size((len(known), *shape[1:]))
        read_coded = self._codec.reader(coded, dtype, draws) if known else None
        head = len(new) * own.numel() * dtype.itemsize

        def read(buffer: Tensor) -> Reading:
            result = torch.zeros(shape, dtype=compute_dtype(dtype), device=buffer.device)
            found, rows = [], []
            if new:
                whole = from_bytes(buffer[:head].clone(), torch.Size((len(new), *own)), dtype)
                result[new] = whole.to(result.dtype)
                found, rows = [in_clear(result[new])], [new]
            if read_coded is not None:
                rest = read_coded(buffer[head:].clone())
                result[known] = rest.decompressed
                found, rows = [rest, *found], [known, *rows]
            return joined(found, rows, result)

        return read

    def commit(self) -> None:
        self._store.keep(self._new)
        self._new = {}

    def discard(self) -> None:
        self._new = {}

    def state(self) -> dict[str, Any]:
        return self._store.state(self._new)

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        self._store.load(state, device)
        self._new = {}

    def digest(self) -> int:
        return self._store.digest(self._new)


def split_ids(ids: Tensor | Sequence[int], n_microbatches: int) -> list[list[int]]:
    """Sample ids by microbatch, cut as torch cuts a batch.

    Raises:
        ValueError: they are no integers, not of one dimension, or some sample is there twice.
    """
    given = torch.as_tensor(ids)
    is_integer = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if given.ndim != 1 or not is_integer or len(given.unique()) != len(given):
        raise ValueError(
            f"Invalid sample_ids: {given.dtype} of shape {list(given.shape)}. Must be integers, "
            f"[samples], a different one for each sample of the batch: what is kept of a sample "
            f"is found by it."
        )
    return [part.tolist() for part in given.tensor_split(n_microbatches)]
