"""What an allocation makes least, where that is not bytes: the time of a step."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from efsgd.algorithms.interfaces import Placement
from efsgd.compressors import Compressed, Compressor
from efsgd.errors import CollectiveError
from efsgd.layout import Blocks, Layout
from efsgd.randomness import generator_of
from efsgd.rank.accumulation import shared_table
from efsgd.rank.checks import require_counts
from efsgd.rank.costs.network import Network, measure_network
from efsgd.rank.costs.volumes import byte_table, with_value
from efsgd.rank.layers import Layer, Value
from efsgd.wire.collectives import Exchange, run
from efsgd.wire.measuring import Clock, seconds_now
from efsgd.wire.transports import Alone

#: What each layer costs at each value, by compressor, layers, setting, values and the number of
#: workers: an exchange whose result is the same on every worker, a row for each layer.
Costs: TypeAlias = Callable[
    [Compressor, Sequence[Layer], str, Sequence[Value], int], Exchange[Sequence[Sequence[float]]]
]


@dataclass(frozen=True)
class StepTime:
    """The milliseconds of a step that each layer takes: on the network, and to be compressed.

    An instance is a `Costs`. Time on the network is modelled, with what was measured of it or with
    given figures. A payload that is gathered comes from all workers, and counts accordingly.

    Attributes:
        network: its figures, the same on every worker; None: it is measured anew in each decision.
        compression: whether compressing and decompressing are timed, in each decision and at each
            value, and added. Without, and with a given network, nothing is measured.
        repeats: how many times each is timed, for the median.
        clock: tells the seconds; for tests.

    Raises:
        ValueError: `repeats` is out of range.

    Example:
        >>> from efsgd.rank import LGreCo, Network, StepTime
        >>> measured = LGreCo(4, costs=StepTime())
        >>> network = Network(latency=1e-4, seconds_per_byte=1e-9)  # about 8 Gbit/s
        >>> modelled = LGreCo(4, costs=StepTime(network, compression=False))
    """

    network: Network | None = None
    compression: bool = True
    repeats: int = 5
    clock: Clock = time.perf_counter

    def __post_init__(self) -> None:
        require_counts(repeats=self.repeats)

    def __call__(
        self,
        compressor: Compressor,
        layers: Sequence[Layer],
        setting: str,
        values: Sequence[Value],
        world_size: int,
    ) -> Exchange[list[list[float]]]:
        """A row for each layer, a column for each value, in milliseconds.

        Args:
            compressor: of the optimizer.
            layers: the rows.
            setting: whose values they are.
            values: the columns.
            world_size: the number of workers.

        Raises:
            CollectiveError: another worker could not measure.
        """
        network, repeats, clock = self.network, self.repeats, self.clock
        if network is None:
            network = yield from measure_network(
                layers[0].device, world_size, repeats=repeats, clock=clock
            )
        options = compressor, layers, setting, values
        sent = byte_table(*options, world_size, as_all_reduce=True)
        share = network.seconds(0) / len(layers)  # of the latencies, which all layers share
        seconds = [[share + network.seconds(nbytes, 0) for nbytes in row] for row in sent]
        if self.compression:
            measured = yield from compression_seconds(*options, repeats=repeats, clock=clock)
            pairs = [zip(*rows, strict=True) for rows in zip(seconds, measured, strict=True)]
            seconds = [[a + b for a, b in row] for row in pairs]
        return [[1000 * each for each in row] for row in seconds]


def compression_seconds(
    compressor: Compressor,
    layers: Sequence[Layer],
    setting: str,
    values: Sequence[Value],
    *,
    repeats: int = 5,
    clock: Clock = time.perf_counter,
) -> Exchange[list[list[float]]]:
    """The seconds of lines 8 and 10 of Algorithm 2 for each layer alone, without what is sent.

    Each worker times them on made-up numbers, once more than `repeats` to warm up; the medians are
    averaged over the workers. Of what is gathered only the worker's own payload is decompressed.
    """
    known: dict[Any, float] = {}

    def seconds(layer: Layer, value: Value) -> float:
        own = with_value(compressor, layer.settings, setting, value)
        key = layer.dtype, layer.device, own.entry(0, layer.shape, own.settings())
        if key not in known:
            known[key] = _seconds_alone(own, layer, repeats, clock)
        return known[key]

    found = yield from shared_table(
        lambda: [[seconds(layer, value) for value in values] for layer in layers],
        len(layers),
        len(values),
        layers[0].device,
        "seconds of compression",
    )
    if not all(math.isfinite(each) for row in found for each in row):
        raise CollectiveError("another worker could not measure, and says itself why.")
    return found


def _seconds_alone(own: Compressor, layer: Layer, repeats: int, clock: Clock) -> float:
    settings, device, dtype = own.settings(), layer.device, layer.dtype
    entry = own.entry(0, layer.shape, settings)
    if entry.level is None:
        return 0.0
    layout = Layout.plan([entry])
    aggregator = own.aggregator(layout, settings, Placement(dtype, device))
    initial = own.initial_state(entry, settings)
    for name, view in aggregator.state()[entry.index].items():
        view.copy_(initial[name])
    deltas = Blocks(layout, dtype, device)
    made = torch.randn(entry.numel, generator=generator_of(0), dtype=dtype, device="cpu")
    deltas.flat.copy_(made)

    def lines_8_and_10() -> Exchange[Compressed]:
        return (yield from aggregator.aggregate((yield from aggregator.compress(deltas, 1))))

    durations = []
    for _ in range(repeats + 1):
        began = seconds_now(device, clock)
        run(lines_8_and_10(), Alone())
        durations.append(seconds_now(device, clock) - began)
    return statistics.median(durations[1:])
