"""From trainings to the time that each took to a quality which all of them reach."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from matplotlib import pyplot
from matplotlib.axes import Axes

from examples.reporting import MIB, look, save_figure

#: What came of a training: lists of `quality`, `seconds` and `bytes`, one for each test, and what
#: quality `is`. A quality that was not finite is None.
Run: TypeAlias = Mapping[str, Any]
Runs: TypeAlias = Mapping[str, Sequence[Run]]


def is_falling(run: Run) -> bool:
    """Whether less is better."""
    return "perplexity" in run["is"]


def best_of(run: Run) -> float:
    """The best quality of a training."""
    values = [value for value in run["quality"] if value is not None]
    return min(values) if is_falling(run) else max(values)


def shared_quality(runs: Runs) -> float:
    """The best quality that every training has reached.

    Example:
        >>> run = {"is": "test accuracy (%)", "quality": [10.0, 91.0, 90.0]}
        >>> shared_quality({"a": [run], "b": [{**run, "quality": [10.0, 80.0, 95.0]}]})
        91.0
    """
    each = [run for own in runs.values() for run in own]
    best = [best_of(run) for run in each]
    return max(best) if is_falling(each[0]) else min(best)


def seconds_to(run: Run, target: float) -> float | None:
    """When a training has reached a quality, on straight lines between tests; None if never.

    Example:
        >>> run = {"is": "test perplexity", "quality": [60.0, 40.0, 30.0], "seconds": [0, 10, 20]}
        >>> seconds_to(run, 50.0), seconds_to(run, 30.0), seconds_to(run, 20.0)
        (5.0, 20.0, None)
    """
    sign = -1 if is_falling(run) else 1
    before: tuple[float, float] | None = None
    for value, seconds in zip(run["quality"], run["seconds"], strict=True):
        if value is None:
            before = None
            continue
        if sign * (value - target) >= 0:
            if before is None or before[0] == value:
                return float(seconds)
            part = (target - before[0]) / (value - before[0])
            return float(before[1] + part * (seconds - before[1]))
        before = value, seconds
    return None


def table(runs: Runs, target: float, baseline: str) -> list[tuple[str, ...]]:
    """A row for each method: final quality, what was sent, and medians of times."""
    times = {method: _median_time(own, target) for method, own in runs.items()}
    rows = []
    for method, own in runs.items():
        final = torch.tensor([run["quality"][-1] or torch.nan for run in own], dtype=torch.float64)
        spread = f" ± {final.std().item():.2f}" if len(own) > 1 else ""
        reached, first = times[method], times.get(baseline)
        rows.append(
            (
                method,
                f"{final.mean().item():.2f}{spread}",
                f"{own[0]['bytes'][-1] / MIB:.1f}",
                f"{statistics.median(run['seconds'][-1] for run in own):.0f}",
                "never" if reached is None else f"{reached:.1f}",
                "" if reached is None or first is None else f"{first / reached:.2f}×",
            )
        )
    return rows


def _median_time(own: Sequence[Run], target: float) -> float | None:
    times = [seconds_to(run, target) for run in own]
    known = [seconds for seconds in times if seconds is not None]
    return statistics.median(known) if len(known) == len(times) else None


def plot(path: Path, title: str, runs: Runs, target: float) -> None:
    """Quality against seconds and against bytes sent, one line for each method's first seed.

    Args:
        path: of the image.
        title: above it.
        runs: of each method.
        target: marked by a line.
    """
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for number, (method, own) in enumerate(runs.items()):
        style = {**look(number), "markersize": 3}
        for axes, name, unit in ((left, "seconds", 1.0), (right, "bytes", MIB)):
            # Before the first step there is nothing, which a logarithmic axis does not have.
            x = [value / unit for value in own[0][name][1:]]
            axes.plot(x, _mean(own)[1:], label=method, **style)
    for axes, label in ((left, "seconds of training"), (right, "MB sent by each worker")):
        _finish(axes, label, target)
    left.set_title(title, loc="left")
    left.set_ylabel(next(iter(runs.values()))[0]["is"])
    _limit(left, runs)
    left.legend(frameon=False, fontsize=7)
    save_figure(path, figure)


def _mean(own: Sequence[Run]) -> list[float]:
    """Quality after each test, over the seeds."""
    tests = zip(*(run["quality"] for run in own), strict=True)
    return [torch.tensor([v or torch.nan for v in each]).mean().item() for each in tests]


def _finish(axes: Axes, label: str, target: float) -> None:
    axes.axhline(target, color="#999999", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _limit(axes: Axes, runs: Runs) -> None:
    """Leaves out what comes before training has begun to help."""
    best = [best_of(run) for own in runs.values() for run in own]
    if is_falling(next(iter(runs.values()))[0]):
        axes.set_ylim(0.95 * min(best), 2.5 * min(best))
    else:
        axes.set_ylim(max(0.0, min(best) - 15), 100)
