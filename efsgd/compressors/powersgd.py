"""PowerSGD as a compressor: which tensors, at which rank, starting from which Q."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from efsgd.blocks import Entry, Layout, matrix_shape
from efsgd.compressors.base import Claims
from efsgd.fusion import has_compiler, shared_fusion
from efsgd.powersgd import PowerIteration
from efsgd.query import initial_query

__all__ = ["PowerSGD"]


@dataclass(frozen=True)
class PowerSGD:
    """Rank-r compression (arXiv 1905.13727, Algorithm 1).

    A tensor of two or more dimensions is seen as the matrix [n, m], n its first dimension, and
    compressed to rank r = min(n, m, rank) where n·m > min_compression_rate·r·(n + m). All others
    are sent as they are.

    Attributes:
        rank: at least 1. May be set per parameter group.
        min_compression_rate: by which factor compression must reduce a tensor's floats to be
            done at all. 1.0 compresses wherever fewer floats are sent, as the paper's figures
            have it; 0.0 compresses every matrix; infinity none. May be set per parameter group.
        warm_start: whether power iteration goes on from the last step's Q; else Q is drawn
            anew at each step.
        seed: of Q's first values, the same on every worker.
        compile: whether torch.compile fuses products of ranks up to 8 into what is done with them.

    Example:
        >>> from efsgd import PowerSGD
        >>> compressor = PowerSGD(rank=4)
        >>> compressor.level((64, 3, 3, 3), compressor.settings())
        4
        >>> print(compressor.level((64,), compressor.settings()))
        None
    """

    rank: int = 4
    min_compression_rate: float = 1.0
    warm_start: bool = True
    seed: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        self.validate(self.settings())

    def settings(self) -> dict[str, Any]:
        """The entries of a parameter group that PowerSGD reads, with their defaults."""
        return asdict(self)

    def shared_settings(self) -> tuple[str, ...]:
        """Names of the settings that must be the same in every group."""
        return ("warm_start", "seed", "compile")

    def validate(self, settings: Mapping[str, Any]) -> None:
        """Checks the settings of one group.

        Raises:
            ValueError: a setting is of the wrong type or out of range.
        """
        rank, rate = settings["rank"], settings["min_compression_rate"]
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(
                f"Invalid rank: {rank!r}. Must be an integer of at least 1. To send gradients "
                f"uncompressed, use min_compression_rate=math.inf."
            )
        if not isinstance(rate, int | float) or math.isnan(rate) or rate < 0:
            raise ValueError(
                f"Invalid min_compression_rate: {rate!r}. Must be a number of at least 0; "
                f"1.0 compresses wherever fewer floats are sent."
            )
        for name in ("warm_start", "compile"):
            if not isinstance(settings[name], bool):
                raise ValueError(f"Invalid {name}: {settings[name]!r}. Must be a bool.")
        if not isinstance(settings["seed"], int) or settings["seed"] < 0:
            raise ValueError(f"Invalid seed: {settings['seed']!r}. Must be an integer, at least 0.")

    def claims(self) -> Claims:
        """It is averaged; what is not sent of a matrix is orthogonal to what is."""
        return Claims(averages=True, contraction=lambda shape: 0.0)

    def payload_bytes(
        self, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32, step: int = 0
    ) -> int:
        """r·(n + m) numbers for each matrix, and all those of other tensors.

        Example:
            >>> from efsgd import PowerSGD
            >>> PowerSGD(rank=2).payload_bytes([(64, 32), (64,)])
            1024
        """
        floats = 0
        for shape in shapes:
            rank = self.level(shape, self.settings())
            floats += math.prod(shape) if rank is None else rank * sum(matrix_shape(shape))
        return floats * dtype.itemsize

    def beat(self, step: int, settings: Mapping[str, Any]) -> None:
        """All steps are alike."""

    def level(self, shape: Sequence[int], settings: Mapping[str, Any]) -> int | None:
        """The rank at which a tensor of this shape is sent; None: uncompressed."""
        if len(shape) < 2 or math.prod(shape) == 0:
            return None
        n, m = matrix_shape(shape)
        r: int = min(n, m, settings["rank"])
        return r if n * m > settings["min_compression_rate"] * r * (n + m) else None

    def initial_state(self, entry: Entry, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """{"q": the first Q, [m, r] float64}."""
        rank = entry.level
        assert isinstance(rank, int)
        _, m = matrix_shape(entry.shape)
        return {"q": initial_query(settings["seed"], entry.index, m, rank)}

    def aggregator(
        self,
        layout: Layout,
        settings: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        worker: int = 0,
        world_size: int = 1,
    ) -> PowerIteration:
        """Algorithm 1 for the tensors of one layout."""
        fusion = shared_fusion() if settings["compile"] and has_compiler(device) else None
        seed, warm_start = settings["seed"], settings["warm_start"]
        return PowerIteration(
            layout, dtype, device, seed=seed, warm_start=warm_start, fusion=fusion
        )
