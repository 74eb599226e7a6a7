"""Signs and one scale per tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Claims
from efsgd.algorithms.operators import Payload
from efsgd.algorithms.reading import Reading, signs
from efsgd.compressors.numerics import chunks
from efsgd.compressors.tensor_compressor import TensorCompressor
from efsgd.randomness import Draws, RowDraws
from efsgd.wire.payload import Field

# From so many elements several threads share the sum of a tensor, and round otherwise.
SUMMED_AT_ONCE = 2**15


@dataclass(frozen=True)
class SignNorm(TensorCompressor):
    """Sends the sign of each element, in one bit, and the mean of their magnitudes.

    A tensor Δ of d elements becomes (‖Δ‖₁ / d)·sign(Δ), where the sign of zero is +1. What is not
    sent has the squared norm ‖Δ‖² − ‖Δ‖₁² / d. Payloads are gathered.

    Source: Karimireddy, Rebjock, Stich, Jaggi: "Error Feedback Fixes SignSGD and other Gradient
    Compression Schemes", ICML 2019, arXiv 1901.09847; "Sign+Norm" in PowerSGD (arXiv 1905.13727).

    Example:
        >>> from efsgd import ErrorFeedbackSGD, SignNorm
        >>> x = torch.zeros(3, requires_grad=True)
        >>> x.grad = torch.tensor([1.0, -6.0, 2.0])
        >>> ErrorFeedbackSGD([x], lr=1.0, momentum_form="sgd", compressor=SignNorm()).step()
        >>> x.tolist()
        [-3.0, 3.0, -3.0]
        >>> SignNorm().payload_bytes([(64, 32), (64,)])  # of 8448 in float32
        272
    """

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        """A bit for each element, set where it is not negative; the scale."""
        return Field(shape.numel(), bits=1), Field(1)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        """The signs, [numel] bool, and the mean of all magnitudes, [1]."""
        # In float64 neither long sums nor sums of large numbers are lost.
        totals = [chunk.abs().sum(dtype=torch.float64) for (chunk,) in chunks(delta)]
        scale = torch.stack(totals).sum() / delta.numel()
        return (delta >= 0).view(-1), scale.to(delta.dtype).view(1)

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return self._values(*payload).view(shape)

    def add_decompressed_(self, out: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        scale = alpha * payload[1]
        for part, is_positive in chunks(out, payload[0]):
            part.add_(self.decompress((is_positive, scale), part.shape, draws))

    def takes_rows(self, shape: torch.Size) -> bool:
        return shape.numel() < SUMMED_AT_ONCE

    def compress_rows(self, deltas: Tensor, draws: RowDraws) -> Payload:
        rows = deltas.view(len(deltas), -1)
        totals = rows.abs().sum(dim=1, keepdim=True, dtype=torch.float64)
        return rows >= 0, (totals / rows.shape[1]).to(deltas.dtype)

    def decompress_rows(self, payload: Payload, shape: torch.Size, draws: RowDraws) -> Tensor:
        return self._values(*payload).view(-1, *shape)

    def add_decompressed_rows_(
        self, out: Tensor, payload: Payload, draws: RowDraws, alpha: float
    ) -> None:
        is_positive, scale = payload
        out.add_(self._values(is_positive, alpha * scale).view(out.shape))

    def read(self, payload: Payload, decompressed: Tensor, draws: Draws) -> Reading:
        return signs(payload[0], decompressed, payload[1])

    def claims(self) -> Claims:
        """‖Δ‖₁ is at least ‖Δ‖, so that at least a d-th of the squared norm is sent."""
        return Claims(self.averages, contraction=lambda shape: 1 / torch.Size(shape).numel())

    def _values(self, is_positive: Tensor, scale: Tensor) -> Tensor:
        """The scale, with these signs."""
        return is_positive.to(torch.int8).mul_(2).sub_(1) * scale
