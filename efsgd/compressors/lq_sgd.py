"""LQ-SGD as a compressor: PowerSGD whose factors are sent as codes of a few bits."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Claims
from efsgd.algorithms.lq_sgd import QuantizedPowerIteration, factor_sizes
from efsgd.algorithms.quantization.coded_mean import GatheredMean, ScatteredMean
from efsgd.algorithms.quantization.log_quantizer import LogQuantizer
from efsgd.compressors.powersgd import PowerSGD
from efsgd.layout import Entry, Layout

_AGGREGATIONS = ("gather", "scatter")


_POWER_SGD = PowerSGD()


@dataclass(frozen=True)
class LQSGD:
    """Rank-r compression, its two factors as logarithmic codes (Li et al. 2025, arXiv 2506.17974).

    Which tensors are compressed, and to which rank, is decided as by `PowerSGD`. Each number of P
    and Q is sent as a code of `bits` bits (see `LogQuantizer`), with one scale for each of these
    matrices. What the codes miss is kept in the errors, like all else that is not sent.

    Codes do not add up, so there is no all-reduce of them; and `aggregation` decides which of two
    ways is taken. They give bitwise the same result:

    * "gather": all codes go to all workers. Of each number a worker receives (W - 1)·bits / 8
      bytes, W the number of workers.
    * "scatter": each worker averages a part of all numbers and sends the mean uncompressed. Of each
      number a worker receives (W - 1) / W·(bits / 8 + 4) bytes, in float64 8 in place of 4, in
      two more collectives. With 8 bits this is less from 6 workers on, with 4 bits from 10.

    An all-reduce of uncompressed factors, which is PowerSGD's, brings each worker 2·(W - 1) / W·4
    bytes of each number: with 8 bits "gather" receives less up to 7 workers, "scatter" always.

    Attributes:
        rank: see `PowerSGD`. May be set per parameter group.
        bits: of a code, 2 to 32.
        alpha: how much finer steps are near zero than near the scale; 0.0 has equal steps.
        min_compression_rate: see `PowerSGD`; it counts numbers, of however many bits. May be set
            per parameter group.
        warm_start: see `PowerSGD`.
        seed: see `PowerSGD`.
        aggregation: "gather" or "scatter".

    Example:
        >>> from efsgd import PowerSGD
        >>> from efsgd.compressors.lq_sgd import LQSGD
        >>> shapes = [(512, 512), (512,)]
        >>> PowerSGD(rank=4).payload_bytes(shapes), LQSGD(rank=4, bits=8).payload_bytes(shapes)
        (18432, 6152)
    """

    rank: int = 4
    bits: int = 8
    alpha: float = 10.0
    min_compression_rate: float = 1.0
    warm_start: bool = True
    seed: int = 0
    aggregation: str = "gather"

    def __post_init__(self) -> None:
        self.validate(self.settings())

    def settings(self) -> dict[str, Any]:
        """The entries of a parameter group that LQ-SGD reads, with their defaults."""
        return asdict(self)

    def shared_settings(self) -> tuple[str, ...]:
        """Names of the settings that must be the same in every group."""
        return ("bits", "alpha", "warm_start", "seed", "aggregation")

    def validate(self, settings: Mapping[str, Any]) -> None:
        """Checks the settings of one group.

        Raises:
            ValueError: a setting is of the wrong type or out of range.
        """
        _POWER_SGD.validate({**_POWER_SGD.settings(), **settings})
        _quantizer(settings)
        if settings["aggregation"] not in _AGGREGATIONS:
            raise ValueError(
                f"Invalid aggregation: {settings['aggregation']!r}. Must be 'gather', for few "
                f"workers, or 'scatter', for many."
            )

    def claims(self) -> Claims:
        """It is not averaged; and with few bits, codes may exceed what they stand for.

        Random without a warm start, as `PowerSGD`.
        """
        return Claims(averages=False, is_random=not self.warm_start)

    def payload_bytes(
        self,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype = torch.float32,
        step: int = 0,
        world_size: int = 1,
    ) -> int:
        """What one worker hands over in a step for tensors of these shapes, control words apart.

        With "gather": for all P together their codes, rounded up to a byte, and a number of
        `dtype` for the scale of each; the same for all Q; and all numbers of other tensors. With
        "scatter", for P and for Q, a row for each worker, itself too, and the mean of a part.

        Args:
            shapes: of all tensors.
            dtype: of errors and scales: float32, or float64 for parameters of that precision.
            step: makes no difference.
            world_size: the number of workers; makes a difference with "scatter" only.

        Example:
            >>> from efsgd.compressors.lq_sgd import LQSGD
            >>> LQSGD(rank=2, bits=4).payload_bytes([(64, 32), (64,)])  # 64 + 4, 32 + 4, 256
            360
            >>> scattered = LQSGD(rank=2, bits=4, aggregation="scatter")
            >>> scattered.payload_bytes([(64, 32), (64,)], world_size=4)
            576
        """
        entries = [
            Entry(index, tuple(shape), self.level(shape, self.settings()))
            for index, shape in enumerate(shapes)
        ]
        layout = Layout.plan(entries)
        total = layout.vector_floats * dtype.itemsize
        for sizes in factor_sizes(layout):
            if self.aggregation == "scatter" and sizes:
                total += ScatteredMean.nbytes(sizes, self.bits, dtype.itemsize, world_size)
            else:
                total += GatheredMean.nbytes(sizes, self.bits, dtype.itemsize)
        return total

    def step_kind(self, step: int, settings: Mapping[str, Any]) -> None:
        """All steps are alike."""

    def level(self, shape: Sequence[int], settings: Mapping[str, Any]) -> int | None:
        """The rank at which a tensor of this shape is sent; None: uncompressed."""
        return _POWER_SGD.level(shape, settings)

    def initial_state(self, entry: Entry, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        """{"q": the first Q, [m, r] float64}."""
        return _POWER_SGD.initial_state(entry, {**_POWER_SGD.settings(), **settings})

    def aggregator(
        self,
        layout: Layout,
        settings: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        worker: int = 0,
        world_size: int = 1,
    ) -> QuantizedPowerIteration:
        """Algorithm 1 for the tensors of one layout, with codes for factors."""
        return QuantizedPowerIteration(
            layout,
            dtype,
            device,
            _quantizer(settings),
            seed=settings["seed"],
            warm_start=settings["warm_start"],
            scatters=settings["aggregation"] == "scatter",
            worker=worker,
            world_size=world_size,
        )


def _quantizer(settings: Mapping[str, Any]) -> LogQuantizer:
    return LogQuantizer(settings["bits"], settings["alpha"])
