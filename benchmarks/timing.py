"""Rounds in shuffled order, and what the samples say: medians, quartiles and ratios."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

Samples = Sequence[float]


@dataclass(frozen=True)
class Runner:
    """Something to measure.

    Attributes:
        step: what is timed.
        prepare: what must come before, not timed.
    """

    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Quartiles:
    """The middle of some samples and their spread.

    Attributes:
        low: a quarter of the samples are smaller.
        median: half of them are.
        high: a quarter of them are larger.
    """

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, samples: Samples) -> Self:
        """Quartiles of at least one sample.

        Example:
            >>> Quartiles.of([5.0, 1.0, 2.0, 4.0, 3.0])
            Quartiles(low=2.0, median=3.0, high=4.0)
        """
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        return cls(*statistics.quantiles(samples, n=4, method="inclusive"))

    def scaled(self, factor: float) -> Self:
        """In another unit."""
        return type(self)(self.low * factor, self.median * factor, self.high * factor)


def differences(samples: Samples, floor: Samples) -> list[float]:
    """Each sample less the floor of the same round."""
    return [sample - base for sample, base in zip(samples, floor, strict=True)]


def ratios(numerators: Samples, denominators: Samples) -> list[float]:
    """Ratios within the same round: what slows a whole round down does not change them."""
    return [top / bottom for top, bottom in zip(numerators, denominators, strict=True)]


@dataclass(frozen=True)
class Row:
    """One candidate beside the baseline.

    Attributes:
        name: of the candidate.
        whole: seconds of a whole step.
        net: seconds without forward and backward.
        cost: how many times the baseline's time it takes, net.
        gain: how many times its time the baseline takes, net.
    """

    name: str
    whole: Quartiles
    net: Quartiles
    cost: Quartiles
    gain: Quartiles


def compare(samples: Mapping[str, Samples], *, floor: str, baseline: str) -> list[Row]:
    """All candidates beside one of them, round by round.

    Args:
        samples: seconds by name.
        floor: name of forward and backward alone, which every candidate contains.
        baseline: name of what the others are compared with.

    Returns:
        A row for each candidate but the floor.
    """
    net = {name: differences(samples[name], samples[floor]) for name in samples if name != floor}
    return [
        Row(
            name,
            Quartiles.of(samples[name]),
            Quartiles.of(seconds),
            Quartiles.of(ratios(seconds, net[baseline])),
            Quartiles.of(ratios(net[baseline], seconds)),
        )
        for name, seconds in net.items()
    ]


def orders(names: Iterable[str], rounds: int, seed: int = 0) -> Iterator[list[str]]:
    """The order of the candidates in each round: another in each, the same on all workers.

    Args:
        names: of the candidates.
        rounds: how many orders.
        seed: the same on all workers.
    """
    order, shuffler = list(names), random.Random(seed)
    for _ in range(rounds):
        shuffler.shuffle(order)
        yield list(order)


def clock_for(
    device: torch.device, *, of_thread: bool = False
) -> Callable[[Callable[[], object]], float]:
    """A function that says how many seconds another one takes on `device`.

    On a CPU, with `of_thread`, those that this thread was at work: on a machine that others use as
    well they vary less. On CUDA these are the seconds between two events on the present stream,
    which the call has waited for.
    """

    def on_cpu(step: Callable[[], object]) -> float:
        now = time.thread_time if of_thread else time.perf_counter
        began = now()
        step()
        return now() - began

    def on_cuda(step: Callable[[], object]) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        began.record()
        step()
        ended.record()
        ended.synchronize()
        return 1e-3 * began.elapsed_time(ended)

    return on_cuda if device.type == "cuda" else on_cpu


def measure(
    runners: Mapping[str, Runner],
    rounds: int,
    *,
    warm_up: int,
    clock: Callable[[Callable[[], object]], float],
    seed: int = 0,
    barrier: Callable[[], object] = lambda: None,
    after_round: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each runner's step, once per round.

    Args:
        runners: by name.
        rounds: how many are measured.
        warm_up: how many come before and are not.
        clock: of `clock_for`.
        seed: of the order.
        barrier: brings the workers together before each step.
        after_round: called after each round, those of the warm-up included.
    """
    samples: dict[str, list[float]] = {name: [] for name in runners}
    gc.collect()
    gc.disable()  # a collection would hit whoever happens to be measured
    try:
        for number, order in enumerate(orders(runners, warm_up + rounds, seed)):
            for name in order:
                runners[name].prepare()
                barrier()
                seconds = clock(runners[name].step)
                if number >= warm_up:
                    samples[name].append(seconds)
            gc.collect()
            after_round()
    finally:
        gc.enable()
    return samples
