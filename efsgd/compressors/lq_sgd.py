"""LQ-SGD as a compressor: PowerSGD whose factors are sent as codes of a few bits."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from efsgd.algorithms.interfaces import Aggregator, Claims, Compressor, Placement, Settings
from efsgd.algorithms.lq_sgd import QuantizedPowerIteration, factor_sizes
from efsgd.algorithms.quantization.coded_mean import GatheredMean, ScatteredMean
from efsgd.algorithms.quantization.log_quantizer import LogQuantizer
from efsgd.checks import plain, require_choice
from efsgd.compressors.powersgd import PowerSGD
from efsgd.layout import Entry, Layout

_AGGREGATIONS = ("gather", "scatter")
_POWER_SGD = PowerSGD()


@dataclass(frozen=True)
class LQSGD(Compressor):
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
        batch_dims: see `PowerSGD`. May be set per parameter group.

    Example:
        >>> from efsgd import PowerSGD
        >>> from efsgd.compressors.lq_sgd import LQSGD
        >>> shapes = [(512, 512), (512,)]
        >>> PowerSGD(rank=4).payload_bytes(shapes), LQSGD(rank=4, bits=8).payload_bytes(shapes)
        (18432, 6152)
        >>> LQSGD(rank=2, bits=4).payload_bytes([(64, 32), (64,)])  # 64 + 4, 32 + 4, 256
        360
        >>> scattered = LQSGD(rank=2, bits=4, aggregation="scatter")
        >>> scattered.payload_bytes([(64, 32), (64,)], world_size=4)
        576
    """

    rank: int = 4
    bits: int = 8
    alpha: float = 10.0
    min_compression_rate: float = 1.0
    warm_start: bool = True
    seed: int = 0
    aggregation: str = "gather"
    batch_dims: int = 0

    def __post_init__(self) -> None:
        self.validate(self.settings())

    def shared_settings(self) -> tuple[str, ...]:
        return ("bits", "alpha", "warm_start", "seed", "aggregation")

    def validate(self, settings: Settings) -> None:
        _POWER_SGD.validate({**_POWER_SGD.settings(), **settings})
        _quantizer(settings)
        few_or_many = "'gather' is for few workers, 'scatter' for many."
        require_choice("aggregation", settings["aggregation"], _AGGREGATIONS, remedy=few_or_many)

    def claims(self) -> Claims:
        """It is not averaged; and with few bits, codes may exceed what they encode.

        Random without a warm start, as `PowerSGD`.
        """
        return Claims(averages=False, is_random=not self.warm_start)

    def compressed_bytes(self, layout: Layout, placement: Placement, step: int) -> int:
        """What one worker hands over: the codes of all P, and of all Q, with their scales.

        With "scatter", for P and for Q, a row for each worker, itself too, and the mean of a part.
        """
        kind = ScatteredMean if self.aggregation == "scatter" and layout.batches else GatheredMean
        own = self.bits, placement.dtype.itemsize, placement.world_size
        return sum(kind.nbytes(sizes, *own) for sizes in factor_sizes(layout))

    def level(self, shape: Sequence[int], settings: Settings) -> int | None:
        return _POWER_SGD.level(shape, settings)

    def initial_state(self, entry: Entry, settings: Settings) -> dict[str, Tensor]:
        return _POWER_SGD.initial_state(entry, {**_POWER_SGD.settings(), **settings})

    def aggregator(self, layout: Layout, settings: Settings, placement: Placement) -> Aggregator:
        return QuantizedPowerIteration(
            layout,
            placement,
            _quantizer(settings),
            seed=int(settings["seed"]),
            warm_start=settings["warm_start"],
            scatters=settings["aggregation"] == "scatter",
        )


def _quantizer(settings: Settings) -> LogQuantizer:
    return LogQuantizer(plain(settings["bits"]), plain(settings["alpha"]))
