"""PowerSGD as a compressor: which tensors, at which rank, starting from which Q."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.alternating import AlternatingPowerIteration, initial_left
from efsgd.algorithms.interfaces import Claims
from efsgd.algorithms.low_rank.factors import initial_query
from efsgd.algorithms.low_rank.fusion import has_compiler, shared_fusion
from efsgd.algorithms.powersgd import PowerIteration
from efsgd.layout import Entry, Layout, matrix_shape


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
        alternating: whether a step multiplies from one side only, by turns from the right and from
            the left: one all-reduce per step and half the bytes, and in each step an approximation
            from a subspace that is one step older. See `efsgd.algorithms.alternating`.

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
    alternating: bool = False

    def __post_init__(self) -> None:
        self.validate(self.settings())

    def settings(self) -> dict[str, Any]:
        """The entries of a parameter group that PowerSGD reads, with their defaults."""
        return asdict(self)

    def shared_settings(self) -> tuple[str, ...]:
        """Names of the settings that must be the same in every group."""
        return ("warm_start", "seed", "compile", "alternating")

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
        for name in ("warm_start", "compile", "alternating"):
            if not isinstance(settings[name], bool):
                raise ValueError(f"Invalid {name}: {settings[name]!r}. Must be a bool.")
        if not isinstance(settings["seed"], int) or settings["seed"] < 0:
            raise ValueError(f"Invalid seed: {settings['seed']!r}. Must be an integer, at least 0.")

    def claims(self) -> Claims:
        """It is averaged; what is not sent of a matrix is orthogonal to what is, always.

        Random without a warm start: each step then draws what it starts from.
        """
        is_random = not self.warm_start
        return Claims(averages=True, is_random=is_random, contraction=lambda shape: 0.0)

    def payload_bytes(
        self,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype = torch.float32,
        step: int = 0,
        world_size: int = 1,
    ) -> int:
        """r·(n + m) numbers for each matrix, and all those of other tensors.

        With `alternating`, r·n and r·m by turns.

        Args:
            shapes: of all tensors.
            dtype: of errors and factors: float32, or float64 for parameters of that precision.
            step: counted from the first that compresses.
            world_size: makes no difference.

        Example:
            >>> from efsgd import PowerSGD
            >>> PowerSGD(rank=2).payload_bytes([(64, 32), (64,)])
            1024
        """
        floats = 0
        for shape in shapes:
            rank = self.level(shape, self.settings())
            if rank is None:
                floats += math.prod(shape)
            else:
                floats += self._floats_of(*matrix_shape(shape), rank, step)
        return floats * dtype.itemsize

    def _floats_of(self, n: int, m: int, rank: int, step: int) -> int:
        """What is sent for one matrix in a step, counted from the first that compresses."""
        if self.alternating:
            return rank * (n if step % 2 == 0 else m)
        return rank * (n + m)

    def step_kind(self, step: int, settings: Mapping[str, Any]) -> Hashable:
        """With `alternating`, which side it is that a step multiplies from. Else all are alike."""
        since = step - start_of(settings)
        if not settings["alternating"] or since < 0:
            return None
        return "left" if since % 2 else "right"

    def level(self, shape: Sequence[int], settings: Mapping[str, Any]) -> int | None:
        """The rank at which a tensor of this shape is sent; None: uncompressed."""
        if len(shape) < 2 or math.prod(shape) == 0:
            return None
        n, m = matrix_shape(shape)
        r: int = min(n, m, settings["rank"])
        return r if n * m > settings["min_compression_rate"] * r * (n + m) else None

    def initial_state(self, entry: Entry, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """{"q": the first Q, [m, r] float64}; with `alternating` also "p", the first P, [n, r]."""
        rank = entry.level
        assert isinstance(rank, int)
        n, m = matrix_shape(entry.shape)
        state = {"q": initial_query(settings["seed"], entry.index, m, rank)}
        if settings["alternating"]:
            state["p"] = initial_left(settings["seed"], entry.index, n, rank)
        return state

    def aggregator(
        self,
        layout: Layout,
        settings: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        worker: int = 0,
        world_size: int = 1,
    ) -> PowerIteration | AlternatingPowerIteration:
        """Algorithm 1, or its alternating form, for the tensors of one layout."""
        options = options_of(settings, device)
        if settings["alternating"]:
            return AlternatingPowerIteration(
                layout, dtype, device, start=start_of(settings), **options
            )
        return PowerIteration(layout, dtype, device, **options)


def start_of(settings: Mapping[str, Any]) -> int:
    """The number of the first step that compresses, of the optimizer whose settings these are."""
    return int(settings.get("start_compressing_at", 0))


def options_of(settings: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """What all aggregators of this family are given."""
    fusion = shared_fusion() if settings["compile"] and has_compiler(device) else None
    return {"seed": settings["seed"], "warm_start": settings["warm_start"], "fusion": fusion}
