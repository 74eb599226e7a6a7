"""Each element as one of equally spaced values around zero, which stays zero."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Claims
from efsgd.algorithms.operators import Payload
from efsgd.checks import require_integer
from efsgd.compressors.numerics import chunks
from efsgd.compressors.tensor_compressor import TensorCompressor
from efsgd.randomness import Draws, RowDraws
from efsgd.wire.payload import Field


@dataclass(frozen=True)
class SymmetricQuantized(TensorCompressor):
    """Sends each element in a few bits, on a grid that has zero in it.

    With s the largest magnitude and L = 2**(bits − 1) − 1 an element x becomes the code
    round(L·x / s), from −L to L, and the code c becomes (c / L)·s. Zeros stay zeros, and so do
    elements below s / (2 L); the largest is exact. Where most elements are small beside the
    largest, as in gradients of activations, min-max quantization (`UniformQuantized`) has no value
    for them. Payloads are gathered.

    What is not sent of d elements has at most (1 − 1/d) of their squared norm: no element is
    further off than it is from zero.

    Source: Wang et al.: "Fine-tuning Language Models over Slow Networks using Activation
    Compression with Guarantees" (AQ-SGD), NeurIPS 2022, arXiv 2206.01299. Its grid has a further
    value at −s, and rounds to 2**(bits − 1) of them on either side, where the largest is cut off.

    Attributes:
        bits: of a code, from 2 to 16. May be set per parameter group.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from efsgd import ErrorFeedbackSGD, SymmetricQuantized
        >>> x = torch.zeros(4, requires_grad=True)
        >>> x.grad = torch.tensor([0.0, 3.0, -0.4, 1.4])
        >>> compressor = SymmetricQuantized(bits=3)
        >>> ErrorFeedbackSGD([x], lr=1.0, momentum_form="sgd", compressor=compressor).step()
        >>> x.tolist()
        [0.0, -3.0, 0.0, -1.0]
        >>> compressor.payload_bytes([(64, 32)])  # of 8192 in float32
        772
    """

    bits: int = 8

    def __post_init__(self) -> None:
        require_integer("bits", self.bits, 2, 16, remedy="8 take a quarter of float32.")

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        """A code for each element; the largest magnitude."""
        return Field(shape.numel(), bits=self.bits), Field(1)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        """The codes plus L, [numel] uint8 or int32, and [s]."""
        largest = _largest(*torch.aminmax(delta))
        codes = torch.empty(delta.numel(), dtype=self._dtype, device=delta.device)
        for chunk, place in chunks(delta, codes):
            place.copy_(self._codes(chunk, largest))
        return codes, largest.view(1)

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return self._values(*payload).view(shape)

    def add_decompressed_(self, out: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        for part, codes in chunks(out, payload[0]):
            part.add_(self.decompress((codes, payload[1]), part.shape, draws), alpha=alpha)

    def takes_rows(self, shape: torch.Size) -> bool:
        return True

    def compress_rows(self, deltas: Tensor, draws: RowDraws) -> Payload:
        rows = deltas.view(len(deltas), -1)
        largest = _largest(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True))
        return self._codes(rows, largest).to(self._dtype), largest

    def decompress_rows(self, payload: Payload, shape: torch.Size, draws: RowDraws) -> Tensor:
        return self._values(*payload).view(-1, *shape)

    def claims(self) -> Claims:
        """The largest element is sent, and no other one is made worse than zero."""
        return Claims(self.averages, contraction=lambda shape: 1 / torch.Size(shape).numel())

    def _codes(self, x: Tensor, largest: Tensor) -> Tensor:
        """Codes plus L, in the dtype of the elements."""
        divisor = torch.where(largest > 0, largest, 1.0)
        return (x / divisor).mul_(self._last).round_().add_(self._last)

    def _values(self, codes: Tensor, largest: Tensor) -> Tensor:
        """What codes stand for."""
        return codes.to(largest.dtype).sub_(self._last).div_(self._last).mul_(largest)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.int32

    @property
    def _last(self) -> int:
        return int(2 ** (self.bits - 1) - 1)


def _largest(low: Tensor, high: Tensor) -> Tensor:
    """The largest magnitude between two bounds; zero has no sign, so that equal bytes mean it."""
    return torch.maximum(-low, high).abs()
