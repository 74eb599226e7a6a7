"""Both ends of a link in one process: what one sends is handed over to the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from hypothesis import strategies as st
from torch import Tensor

from efsgd import RandomK, SignNorm, SymmetricQuantized, TensorCompressor, TopK, UniformQuantized
from efsgd.pipeline import Link
from efsgd.pipeline.ends import End, Masks
from efsgd.pipeline.memory import SampleMemory, split_ids

DETERMINISTIC: list[TensorCompressor] = [
    UniformQuantized(bits=4),
    SymmetricQuantized(bits=3),
    TopK(density=0.2),
    SignNorm(),
]
COMPRESSORS = [*DETERMINISTIC, RandomK(density=0.4, seed=5), UniformQuantized(2, stochastic=True)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Of activations: samples, and what each consists of.
_samples = st.integers(1, 4)
activation_shapes = st.one_of(
    st.tuples(_samples, st.integers(4, 24)),
    st.tuples(_samples, st.integers(1, 3), st.integers(1, 8)),
    st.tuples(_samples),
)


def made(shape: Sequence[int], dtype: torch.dtype, *path: int) -> Tensor:
    """Normal numbers that depend on the path alone."""
    generator = torch.Generator().manual_seed(hash(path) & 0xFFFFFFFF)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


@dataclass
class Operation:
    """A `torch.distributed.P2POp`, which cannot be made without a process group."""

    op: Any
    tensor: Tensor
    peer: int = 0
    group: Any = None
    tag: int = 0


class Pair:
    """A sender and a receiver, with masks of their own.

    Attributes:
        sizes: of the messages of the last step, in bytes.
    """

    def __init__(self, link: Link, masks: Sequence[Masks | None] = (None, None)) -> None:
        self.sender = End(link, 3, "sent", masks[0])
        self.receiver = End(link, 3, "received", masks[1])
        self.sizes: list[int] = []

    @property
    def ends(self) -> tuple[End, End]:
        return self.sender, self.receiver

    def begin(self, step: int = 1, ids: Sequence[int] | None = None, chunks: int = 1) -> None:
        for end in self.ends:
            end.begin(step)
            end.forget_shapes()
            if ids is not None:
                assert isinstance(end.memory, SampleMemory)
                end.memory.announce(split_ids(ids, chunks))
        self.sizes = []

    def carry(
        self, tensors: Sequence[Tensor], *, chunk: int = 0, trains: bool = True, scale: float = 1.0
    ) -> list[Tensor]:
        """What arrives of the outputs of a microbatch."""
        places = [torch.empty(t.shape, dtype=t.dtype) for t in tensors]
        sends = [Operation(dist.isend, tensor) for tensor in tensors]
        receives = [Operation(dist.irecv, place) for place in places]
        with mock.patch("efsgd.pipeline.ends.dist.P2POp", Operation):
            sent = self.sender.pack(sends, chunk, trains=trains, scale=scale)
            expected = self.receiver.expect(receives, chunk, trains=trains)
        for source, target in zip(sent, expected, strict=True):
            assert source.tensor.dtype == target.tensor.dtype
            assert source.tensor.shape == target.tensor.shape
            target.tensor.copy_(source.tensor.detach())
            self.sizes.append(source.tensor.numel() * source.tensor.itemsize)
        self.receiver.unpack(chunk, trains=trains, scale=scale)
        return places

    def end(self, *, is_kept: bool = True) -> None:
        """The step is over, or has failed."""
        assert self.sender._messages == self.receiver._messages
        for end in self.ends:
            assert end.is_done(end._messages)
            end.settle(is_kept=is_kept)

    def step(
        self, tensor: Tensor, step: int = 1, ids: Sequence[int] | None = None, **options: Any
    ) -> Tensor:
        """A whole step of one microbatch with one output."""
        is_kept = options.pop("is_kept", True)
        self.begin(step, ids)
        (found,) = self.carry([tensor], **options)
        self.end(is_kept=is_kept)
        return found

    def digests(self) -> list[int]:
        """Of what each end keeps."""
        return [end.memory.digest() for end in self.ends if end.memory is not None]
