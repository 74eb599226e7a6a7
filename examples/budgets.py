"""What methods achieve that may send a number of bytes: a table and a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from rich.table import Table

from examples.comparison import Method
from examples.history import History
from examples.reporting import look, mean_and_deviation, milliseconds, save_figure


@dataclass(frozen=True)
class Candidate:
    """A method that is compared within a budget.

    Attributes:
        budget: how many bytes it may send, in a word; empty for the baseline.
        algorithm: its name, with its rank.
        family: its name without; the plot joins what belongs together.
        averages: whether all-reduces carry what it sends.
        train: the method.
    """

    budget: str
    algorithm: str
    family: str
    averages: bool
    train: Method

    @property
    def name(self) -> str:
        """What tells it from all other candidates."""
        return f"{self.budget}: {self.algorithm}" if self.budget else self.algorithm


def budget_table(
    title: str,
    quality: str,
    runs: Mapping[str, Sequence[History]],
    *,
    candidates: Mapping[str, Candidate],
) -> Table:
    """A table in the form of Table 4 of the PowerSGD paper.

    Args:
        title: of the task.
        quality: what quality means.
        runs: for each candidate's name the histories over the seeds, the baseline's first.
        candidates: by name.
    """
    table = Table(title=title, title_justify="left")
    for column in ("Budget", "Algorithm"):
        table.add_column(column, no_wrap=True)
    for column in (quality.capitalize(), "Sent per epoch", "Ratio", "All-reduce", "Time per batch"):
        table.add_column(column, justify="right")
    baseline = next(iter(runs.values()))
    last = ""
    for name, histories in runs.items():
        candidate = candidates[name]
        is_new = candidate.budget != last
        if is_new:
            table.add_section()
        mean, deviation = mean_and_deviation(histories)
        sent = _bytes_per_epoch(histories)
        table.add_row(
            candidate.budget if is_new else "",
            candidate.algorithm,
            f"{mean:.2f}" + (f" ± {deviation:.2f}" if len(histories) > 1 else ""),
            _size(sent),
            f"{_bytes_per_epoch(baseline) / sent:.1f}×" if sent else "",
            "yes" if candidate.averages else "no",
            f"{milliseconds(histories):.1f} ms",
        )
        last = candidate.budget
    return table


def plot_budgets(
    path: Path,
    tasks: Mapping[str, tuple[str, Mapping[str, Sequence[History]]]],
    *,
    candidates: Mapping[str, Candidate],
) -> None:
    """Final quality against bytes sent, a plot for each task.

    A point is a mean over the seeds, a bar one standard deviation each way; a dashed line is at
    the quality of the baseline.

    Args:
        path: of the image.
        tasks: for each task what quality means, and the histories by candidate's name.
        candidates: by name.
    """
    figure, rows = pyplot.subplots(len(tasks), 1, figsize=(8, 4.2 * len(tasks)), squeeze=False)
    for (title, (quality, runs)), (axes,) in zip(tasks.items(), rows, strict=True):
        _draw(axes, runs, candidates)
        axes.set_title(title, loc="left")
        axes.set_xlabel("KiB sent by each worker per epoch")
        axes.set_ylabel(quality)
    save_figure(path, figure)


def _draw(
    axes: Axes, runs: Mapping[str, Sequence[History]], candidates: Mapping[str, Candidate]
) -> None:
    families: dict[str, list[tuple[float, float, float]]] = {}
    for name, histories in runs.items():
        point = (max(_bytes_per_epoch(histories), 1) / 2**10, *mean_and_deviation(histories))
        families.setdefault(candidates[name].family, []).append(point)
    for number, (family, points) in enumerate(families.items()):
        sent, means, deviations = zip(*sorted(points), strict=True)
        axes.errorbar(
            sent, means, deviations, label=family, capsize=3, linewidth=1, markersize=6,
            **look(number),
        )  # fmt: skip
    mean, _ = mean_and_deviation(next(iter(runs.values())))
    axes.axhline(mean, color="#000000", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _bytes_per_epoch(histories: Sequence[History]) -> float:
    """The mean over all epochs, as epochs need not be alike."""
    return histories[0].bytes_sent[-1] / (len(histories[0].bytes_sent) - 1)


def _size(count: float) -> str:
    if not count:
        return "nothing"
    return f"{count / 2**10:.1f} KiB" if count < 2**20 else f"{count / 2**20:.2f} MiB"
