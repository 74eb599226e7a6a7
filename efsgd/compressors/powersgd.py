"""PowerSGD as a compressor: which tensors, at which rank, starting from which Q."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.alternating import AlternatingPowerIteration, initial_left
from efsgd.algorithms.interfaces import Aggregator, Claims, Compressor, Placement, Settings
from efsgd.algorithms.low_rank.factors import initial_query
from efsgd.algorithms.low_rank.fusion import has_compiler, shared_fusion
from efsgd.algorithms.low_rank.products import rank_of
from efsgd.algorithms.powersgd import PowerIteration
from efsgd.checks import require_bool, require_integer, require_number
from efsgd.layout import Batch, Entry, Layout, matrix_shape


@dataclass(frozen=True)
class PowerSGD(Compressor):
    """Rank-r compression (arXiv 1905.13727, Algorithm 1).

    A tensor of two or more dimensions is seen as the matrix [n, m], n its first dimension, and
    compressed to rank r = min(n, m, rank) where n·m > min_compression_rate·r·(n + m). All others
    are sent as they are.

    Attributes:
        rank: at least 1. May be set per parameter group.
        min_compression_rate: by which factor compression must reduce a tensor's floats to be
            done at all. 1.0 compresses wherever fewer floats are sent, as the paper's figures
            have it; 0.0 compresses every matrix; infinity none. May be set per parameter group.
        warm_start: whether power iteration starts from the last step's Q; else Q is drawn anew at
            each step.
        seed: of Q's first values, the same on every worker.
        compile: for ranks up to 8, whether passes over memory are native code on CPUs, and products
            fused by torch.compile with what is done with them on accelerators.
        alternating: whether a step multiplies from one side only, by turns from the right and from
            the left: one all-reduce per step and half the bytes, and in each step an approximation
            from a subspace that is one step older. See `efsgd.algorithms.alternating`.
        batch_dims: how many of a tensor's first dimensions count matrices. With 1, experts [E, n,
            m] are E matrices, compressed as E parameters [n, m] would be, to the bit; with 0 they
            are one, of n·m columns. May be set per parameter group. What has fewer than two more
            dimensions is sent as it is: a matrix is a stack of vectors then.

    Example:
        >>> from efsgd import PowerSGD
        >>> compressor = PowerSGD(rank=4)
        >>> compressor.level((64, 3, 3, 3), compressor.settings())
        4
        >>> print(compressor.level((64,), compressor.settings()))
        None
        >>> PowerSGD(rank=2).payload_bytes([(64, 32), (64,)])
        1024
        >>> PowerSGD(rank=2, batch_dims=1).payload_bytes([(8, 64, 32)])  # 8 times 768
        6144
    """

    rank: int = 4
    min_compression_rate: float = 1.0
    warm_start: bool = True
    seed: int = 0
    compile: bool = False
    alternating: bool = False
    batch_dims: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        self.validate(self.settings())

    def shared_settings(self) -> tuple[str, ...]:
        return ("warm_start", "seed", "compile", "alternating")

    def validate(self, settings: Settings) -> None:
        uncompressed = "To send gradients uncompressed, use min_compression_rate=math.inf."
        require_integer("rank", settings["rank"], 1, remedy=uncompressed)
        require_number(
            "min_compression_rate",
            settings["min_compression_rate"],
            finite=False,
            remedy="1.0 compresses wherever fewer floats are sent.",
        )
        for name in ("warm_start", "compile", "alternating"):
            require_bool(name, settings[name])
        require_integer("seed", settings["seed"], 0)
        one_each = "0 makes every tensor one matrix, 1 makes experts [E, n, m] E of them."
        require_integer("batch_dims", settings["batch_dims"], 0, remedy=one_each)

    def claims(self) -> Claims:
        """It is averaged; what is not sent of a matrix is orthogonal to what is, always.

        Linear, as P and Q are: each is a product of the workers' own matrices with what all have
        in common. Random without a warm start: each step then draws what it starts from.
        """
        is_random = not self.warm_start
        return Claims(
            averages=True, is_random=is_random, contraction=lambda shape: 0.0, linear=True
        )

    def compressed_bytes(self, layout: Layout, placement: Placement, step: int) -> int:
        """r·(n + m) numbers for each matrix; with `alternating`, r·n and r·m by turns."""
        floats = sum(len(b.matrices) * self._floats_of(b, step) for b in layout.batches)
        return floats * placement.dtype.itemsize

    def _floats_of(self, batch: Batch, step: int) -> int:
        """What is sent for one matrix in a step, counted from the first that compresses."""
        if self.alternating:
            return rank_of(batch) * (batch.rows if step % 2 == 0 else batch.columns)
        return rank_of(batch) * (batch.rows + batch.columns)

    def step_kind(self, step: int, settings: Settings) -> Hashable:
        """With `alternating`, which side it is that a step multiplies from; else None."""
        since = step - start_of(settings)
        if not settings["alternating"] or since < 0:
            return None
        return "left" if since % 2 else "right"

    def level(self, shape: Sequence[int], settings: Settings) -> int | None:
        batch_dims = self.batch_dims_of(settings)
        if len(shape) < batch_dims + 2 or math.prod(shape) == 0:
            return None
        n, m = matrix_shape(shape, batch_dims)
        r = int(min(n, m, settings["rank"]))
        return r if n * m > settings["min_compression_rate"] * r * (n + m) else None

    def initial_state(self, entry: Entry, settings: Settings) -> dict[str, Tensor]:
        """{"q": the first Q, [m, r] float64}; with `alternating` also "p", the first P, [n, r].

        Of a stack of matrices those of all, [..., m, r] and [..., n, r].
        """
        rank = entry.level
        assert isinstance(rank, int)
        n, m = matrix_shape(entry.shape, entry.batch_dims)
        seed, numbers = int(settings["seed"]), [matrix.number for matrix in entry.matrices()]
        state = {"q": torch.stack([initial_query(seed, k, m, rank) for k in numbers])}
        if settings["alternating"]:
            state["p"] = torch.stack([initial_left(seed, k, n, rank) for k in numbers])
        stacked = entry.shape[: entry.batch_dims]
        return {name: all_.view(*stacked, *all_.shape[1:]) for name, all_ in state.items()}

    def aggregator(self, layout: Layout, settings: Settings, placement: Placement) -> Aggregator:
        options = options_of(settings, placement.device)
        if settings["alternating"]:
            return AlternatingPowerIteration(layout, placement, start=start_of(settings), **options)
        return PowerIteration(layout, placement, **options)


def start_of(settings: Settings) -> int:
    """The number of the first step that compresses, of the optimizer whose settings these are."""
    return int(settings.get("start_compressing_at", 0))


def options_of(settings: Settings, device: torch.device) -> dict[str, Any]:
    """What all aggregators of this family are given."""
    is_native = settings["compile"] and device.type == "cpu"
    fuses = settings["compile"] and not is_native and has_compiler(device)
    return {
        "seed": int(settings["seed"]),
        "warm_start": settings["warm_start"],
        "fusion": shared_fusion() if fuses else None,
        "is_native": is_native,
    }
