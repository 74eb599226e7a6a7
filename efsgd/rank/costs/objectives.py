"""What an allocation is to make least, where it is not bytes."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from efsgd.compressors import Compressor
from efsgd.rank.base import Layer, Value
from efsgd.rank.checks import require_counts
from efsgd.rank.costs.durations import measured_seconds, modelled_seconds
from efsgd.rank.costs.network import Clock, Network, measure_network
from efsgd.rank.costs.volumes import byte_table
from efsgd.wire.collectives import Exchange

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
        """
        network, repeats, clock = self.network, self.repeats, self.clock
        if network is None:
            network = yield from measure_network(
                layers[0].device, world_size, repeats=repeats, clock=clock
            )
        options = compressor, layers, setting, values, world_size
        sent = byte_table(*options, as_all_reduce=True)
        seconds = modelled_seconds(sent, network)
        if self.compression:
            measured = yield from measured_seconds(*options[:-1], repeats=repeats, clock=clock)
            pairs = [zip(*rows, strict=True) for rows in zip(seconds, measured, strict=True)]
            seconds = [[a + b for a, b in row] for row in pairs]
        return [[1000 * each for each in row] for row in seconds]


def checked(
    costs: Exchange[Sequence[Sequence[float]]], rows: int, columns: int
) -> Exchange[Sequence[Sequence[float]]]:
    """What an exchange finds, if it has the shape of a table.

    Raises:
        TypeError: it is no exchange.
        ValueError: it has not.
    """
    if not isinstance(costs, Generator):
        raise TypeError(
            f"Invalid costs: {costs!r}. Must come from a generator: where it needs no collective, "
            f"let `yield from ()` come before `return`."
        )
    found = yield from costs
    if [len(row) for row in found] != [columns] * rows:
        raise ValueError(
            f"Invalid costs: {found!r}. Must be {rows} rows, one for each layer, of {columns} "
            f"numbers, one for each value."
        )
    return found
