"""How long a layer takes at a value of the setting that is decided on: modelled, and measured."""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from efsgd.compressors import Compressed, Compressor
from efsgd.errors import CollectiveError
from efsgd.layout import Blocks, Entry, Layout
from efsgd.profiling import Phases
from efsgd.randomness import generator_of
from efsgd.rank.accumulation import mean_table
from efsgd.rank.base import Layer, Value
from efsgd.rank.costs.network import Clock, Network, seconds_now
from efsgd.rank.costs.volumes import with_value
from efsgd.wire.collectives import Exchange, run
from efsgd.wire.transports import Alone


def modelled_seconds(
    table: Sequence[Sequence[float]], network: Network, collectives: int = 2
) -> list[list[float]]:
    """The seconds that it takes to send what a table of bytes has.

    Args:
        table: of bytes, a row for each layer.
        network: by which they are sent.
        collectives: of a step. Layers share them, and each counts an equal part of their latency.
    """
    share = network.seconds(0, collectives) / max(1, len(table))
    return [[share + network.seconds(nbytes, 0) for nbytes in row] for row in table]


def measured_seconds(
    compressor: Compressor,
    layers: Sequence[Layer],
    setting: str,
    values: Sequence[Value],
    *,
    repeats: int = 5,
    clock: Clock = time.perf_counter,
) -> Exchange[list[list[float]]]:
    """The seconds of lines 8 and 10 of Algorithm 2 for each layer alone, without what is sent.

    Each worker times them on made-up numbers, and the medians are averaged over the workers. Of
    what is gathered only the worker's own payload is decompressed. Add `modelled_seconds` for the
    time on the network.

    Args:
        compressor: of the optimizer.
        layers: the same on every worker.
        setting: whose values they are.
        values: of the setting.
        repeats: how many times each is timed; once more comes before, to warm up.
        clock: tells the time.

    Returns:
        A row for each layer, a column for each value; the same on every worker.

    Raises:
        CollectiveError: another worker could not measure.
    """
    known: dict[Any, float] = {}

    def seconds(layer: Layer, value: Value) -> float:
        own = with_value(compressor, layer.settings, setting, value)
        key = layer.shape, layer.dtype, layer.device, own.level(layer.shape, own.settings())
        if key not in known:
            known[key] = _seconds_alone(own, layer, repeats, clock)
        return known[key]

    found = yield from mean_table(
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
    entry = Entry(0, layer.shape, own.level(layer.shape, settings))
    if entry.level is None:
        return 0.0
    layout = Layout.plan([entry])
    aggregator = own.aggregator(layout, settings, dtype, device)
    aggregator.phases = Phases()
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
