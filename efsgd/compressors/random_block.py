"""Random Block: a run of elements of each tensor, drawn anew at each step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.algorithms.operators import Payload
from efsgd.algorithms.reading import Reading, entries
from efsgd.compressors.budget import DrawnCompressor
from efsgd.compressors.numerics import SMALL
from efsgd.layout import is_fake
from efsgd.randomness import Draws, RowDraws


@dataclass(frozen=True)
class RandomBlock(DrawnCompressor):
    """Sends one block of consecutive elements of each tensor, the same on every worker.

    Its start is uniform over the tensor; a block that reaches the end goes on at the beginning. It
    is not sent, since all workers draw the same one, so that values are averaged in the all-reduce
    that carries the uncompressed tensors.

    Source: PowerSGD (arXiv 1905.13727), "Random Block" in the comparison with others.

    Attributes:
        density: which share of a tensor's elements is sent, above 0 and at most 1. May be set per
            parameter group.
        rank: in place of `density`, the rank of a PowerSGD that sends as many floats; vectors are
            then sent uncompressed. May be set per parameter group.
        seed: of the blocks, the same on every worker.

    Raises:
        ValueError: a setting is out of range, or density and rank are both given, or none.

    Example:
        >>> from efsgd.compressors.random_block import RandomBlock
        >>> RandomBlock(rank=2).payload_bytes([(64, 27), (64,)])  # 182 values, and a vector
        984
    """

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        """The values of this step's block, from its start on."""
        flat = delta.view(-1)
        block, wrapped = self._block(delta.shape, draws)
        return (torch.cat([flat[block], flat[wrapped]]),)

    def add_decompressed_(self, out: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        flat, (values,) = out.view(-1), payload
        block, wrapped = self._block(out.shape, draws)
        flat[block].add_(values[: block.stop - block.start], alpha=alpha)
        flat[wrapped].add_(values[block.stop - block.start :], alpha=alpha)

    def takes_rows(self, shape: torch.Size) -> bool:
        return shape.numel() <= SMALL  # of longer ones slices are copied

    def compress_rows(self, deltas: Tensor, draws: RowDraws) -> Payload:
        return (deltas.view(len(deltas), -1).gather(1, self._positions(deltas, draws)),)

    def add_decompressed_rows_(
        self, out: Tensor, payload: Payload, draws: RowDraws, alpha: float
    ) -> None:
        flat, positions = out.view(len(out), -1), self._positions(out, draws)
        flat.scatter_(1, positions, flat.gather(1, positions).add_(payload[0], alpha=alpha))

    def read(self, payload: Payload, decompressed: Tensor, draws: Draws) -> Reading:
        everywhere = torch.arange(decompressed.numel(), device=decompressed.device)
        positions = [everywhere[part] for part in self._block(decompressed.shape, draws)]
        return entries(decompressed, torch.cat(positions))

    def _block(self, shape: torch.Size, draws: Draws) -> tuple[slice, slice]:
        """Where the block lies: its part up to the end of the tensor, and the rest at the front."""
        numel = shape.numel()
        row, device = draws.as_rows(), torch.device("cpu")
        drawn = row.shared_once(numel, lambda: _starts(row.shared_bits(1, device), numel))
        start = 0 if is_fake(drawn) else int(drawn)
        end = start + self.count(shape)
        return slice(start, min(end, numel)), slice(0, max(end - numel, 0))

    def _positions(self, rows: Tensor, draws: RowDraws) -> Tensor:
        """Where the blocks of several tensors lie: [rows, k] int64."""
        numel, k, device = rows[0].numel(), self.count(rows.shape[1:]), rows.device

        def make() -> Tensor:
            starts = _starts(draws.shared_bits(1, device), numel)
            return starts.add(torch.arange(k, device=device)).remainder_(numel)

        return draws.shared_once((numel, k, device), make)


def _starts(bits: Tensor, numel: int) -> Tensor:
    """From random bits, int64, as many places in a tensor: uniform to within 1e-9 at any size."""
    return bits.bitwise_and(2**62 - 1).remainder_(numel)
