"""How long an all-reduce takes between these workers: a latency, and a time for each byte."""

import time
from dataclasses import dataclass

import torch

from efsgd.rank.checks import require_numbers
from efsgd.wire.collectives import Exchange
from efsgd.wire.measuring import Clock, all_reduce_seconds

#: The size of the larger buffer that is timed: 1 MiB. The smaller one is a single float32.
LARGE_BYTES = 2**20


@dataclass(frozen=True)
class Network:
    """The α–β model: an all-reduce of S bytes takes α + β·S seconds.

    Attributes:
        latency: α, the seconds of a small all-reduce.
        seconds_per_byte: β, of a worker's buffer. Whatever an all-reduce makes of a byte on the
            wire is in it.

    Raises:
        ValueError: one of them is negative, or not finite.

    Example:
        >>> from efsgd.rank import Network
        >>> Network(latency=0.001, seconds_per_byte=1e-8).seconds(500_000)
        0.007
    """

    latency: float
    seconds_per_byte: float

    def __post_init__(self) -> None:
        require_numbers(latency=self.latency, seconds_per_byte=self.seconds_per_byte)

    def seconds(self, nbytes: float, collectives: int = 2) -> float:
        """What all-reduces take, one after the other, by the bytes of a worker's buffers together.

        An ordinary step of PowerSGD has two.
        """
        return collectives * self.latency + nbytes * self.seconds_per_byte


def measure_network(
    device: torch.device, world_size: int, *, repeats: int = 5, clock: Clock = time.perf_counter
) -> Exchange[Network]:
    """Times all-reduces of one float32 and of `LARGE_BYTES`; see `all_reduce_seconds`.

    The network that is found is the same on every worker. One worker alone sends nothing, which
    costs nothing.
    """
    if world_size == 1:
        return Network(0.0, 0.0)
    sizes = 4, LARGE_BYTES
    small, large = yield from all_reduce_seconds(device, sizes, repeats=repeats, clock=clock)
    return Network(max(0.0, small), max(0.0, (large - small) / (LARGE_BYTES - 4)))
