"""Random K: elements of each tensor at random, drawn anew at each step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.algorithms.operators import Payload
from efsgd.algorithms.reading import Reading, entries
from efsgd.compressors.budget import DrawnCompressor
from efsgd.layout import is_fake
from efsgd.randomness import Draws, RowDraws

# Above this share of the elements, marking all that are drawn is faster than sorting them.
SMALL_SHARE = 1 / 32
# Up to so many elements a number is drawn for each, which takes no longer.
FEW = 2**12


def draw_subset(numel: int, k: int, generator: torch.Generator) -> Tensor:
    """Draws k different positions in a tensor; all subsets of that size are equally likely.

    `numel` is at most 2**53. Positions are [k] int64 in ascending order, on the CPU.
    """
    is_small = k <= numel * SMALL_SHARE
    return _few(numel, k, generator) if is_small else _many(numel, k, generator)


def _few(numel: int, k: int, generator: torch.Generator) -> Tensor:
    """In O(k log k): a few too many with replacement, of which some are taken away again.

    How many different ones have come up decides alone what is done next. So whatever their number,
    all subsets of that size are equally likely.
    """
    found = torch.empty(0, dtype=torch.int64, device="cpu")
    while (missing := k - len(found)) > 0:
        expected = numel * math.log((numel - len(found)) / (numel - k))
        count = int(expected + 4 * math.sqrt(missing * k / numel)) + 4
        found = torch.cat([found, _with_replacement(numel, count, generator)]).unique()
    is_kept = torch.ones(len(found), dtype=torch.bool, device="cpu")
    is_kept[_many(len(found), len(found) - k, generator)] = False
    return found[is_kept]


def _many(numel: int, k: int, generator: torch.Generator) -> Tensor:
    """In O(numel): marks positions, or those to leave out if they are fewer, until it is enough."""
    is_marked = torch.zeros(numel, dtype=torch.bool, device="cpu")
    enough = min(k, numel - k)
    while (missing := enough - int(is_marked.count_nonzero())) > 0:
        is_marked[_with_replacement(numel, missing, generator)] = True
    return (is_marked if enough == k else ~is_marked).nonzero().view(-1)


def draw_subsets(k: int, bits: Tensor) -> Tensor:
    """For each row of random bits, [rows, numel] int64, the k positions where they are lowest.

    All subsets are equally likely, to within 1e-12 up to `FEW` elements: so seldom are two of the
    numbers equal. Positions are [rows, k] int64 in ascending order.
    """
    return bits.topk(k, largest=False, sorted=False).indices.sort().values


def _with_replacement(numel: int, count: int, generator: torch.Generator) -> Tensor:
    # Of so many numbers the remainders are equally likely to within 1e-9, up to 2**32 elements.
    return torch.randint(2**62, (count,), generator=generator, device="cpu") % numel


@dataclass(frozen=True)
class RandomK(DrawnCompressor):
    """Sends elements of each tensor that are drawn at random, the same on every worker.

    They are drawn without replacement. Their positions are not sent, since all workers draw the
    same ones, so that values are averaged in the all-reduce that carries the uncompressed tensors.

    Sources: Stich, Cordonnier, Jaggi: "Sparsified SGD with Memory", NeurIPS 2018, arXiv 1809.07599;
    PowerSGD (arXiv 1905.13727), "Random K" in the comparison with others.

    Attributes:
        density: which share of a tensor's elements is sent, above 0 and at most 1. May be set per
            parameter group.
        rank: in place of `density`, the rank of a PowerSGD that sends as many floats; vectors are
            then sent uncompressed. May be set per parameter group.
        seed: of the positions, the same on every worker.

    Raises:
        ValueError: a setting is out of range, or density and rank are both given, or none.

    Example:
        >>> from efsgd.compressors.random_k import RandomK
        >>> RandomK(density=0.25).payload_bytes([(64, 32), (64,)])  # 512 values, and 16
        2112
    """

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return (delta.view(-1)[self._positions(delta, draws)],)

    def add_decompressed_(self, out: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        out.view(-1).index_add_(0, self._positions(out, draws), payload[0], alpha=alpha)

    def takes_rows(self, shape: torch.Size) -> bool:
        return shape.numel() <= FEW

    def compress_rows(self, deltas: Tensor, draws: RowDraws) -> Payload:
        return (deltas.view(-1)[self._positions_of_rows(deltas, draws)],)

    def add_decompressed_rows_(
        self, out: Tensor, payload: Payload, draws: RowDraws, alpha: float
    ) -> None:
        where = self._positions_of_rows(out, draws).view(-1)
        out.view(-1).index_add_(0, where, payload[0].reshape(-1), alpha=alpha)

    def read(self, payload: Payload, decompressed: Tensor, draws: Draws) -> Reading:
        return entries(decompressed, self._positions(decompressed, draws))

    def _positions(self, tensor: Tensor, draws: Draws) -> Tensor:
        numel, k, device = tensor.numel(), self.count(tensor.shape), tensor.device
        if self.takes_rows(tensor.shape):
            return self._positions_of_rows(tensor.unsqueeze(0), draws.as_rows())[0]
        if is_fake(tensor):  # which are sent makes no difference
            return torch.arange(k, device=device)
        return draws.shared_once(
            (numel, k, device), lambda generator: draw_subset(numel, k, generator).to(device)
        )

    def _positions_of_rows(self, rows: Tensor, draws: RowDraws) -> Tensor:
        """In the flattened tensor of all rows, [rows, k] int64."""
        numel, k, device = rows[0].numel(), self.count(rows.shape[1:]), rows.device

        def make() -> Tensor:
            first = torch.arange(0, rows.numel(), numel, device=device).unsqueeze(1)
            return draw_subsets(k, draws.shared_bits(numel, device)).add_(first)

        return draws.shared_once((numel, k, device), make)
