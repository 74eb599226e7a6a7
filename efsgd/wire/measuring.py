"""How long collectives take between these workers."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from efsgd.wire.collectives import AllReduceMean, Exchange

#: Tells seconds, from any beginning.
Clock = Callable[[], float]


def seconds_now(device: torch.device, clock: Clock = time.perf_counter) -> float:
    """The time at which all work that was given to the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock()


def all_reduce_seconds(
    device: torch.device,
    sizes: Sequence[int],
    *,
    repeats: int = 5,
    clock: Clock = time.perf_counter,
) -> Exchange[list[float]]:
    """Times all-reduces of so many bytes each: medians, averaged over the workers.

    Of each size the first one is left out: it waits for the slowest worker to arrive. What is found
    is the same on every worker.
    """
    medians = []
    for nbytes in sizes:
        buffer = torch.zeros(nbytes // 4, dtype=torch.float32, device=device)
        durations = []
        for _ in range(repeats + 1):
            began = seconds_now(device, clock)
            yield AllReduceMean(buffer, "a measurement of the network")
            durations.append(seconds_now(device, clock) - began)
        medians.append(statistics.median(durations[1:]))
    own = torch.tensor(medians, dtype=torch.float64, device=device)
    found: list[float] = (yield AllReduceMean(own, "seconds of all-reduces")).tolist()
    return found
