"""What the examples show and save: progress, results as JSON, tables and plots."""

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from examples.files import replacing
from examples.history import History

matplotlib.use("Agg")  # writes files, needs no screen

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Report = Callable[[int, float, float], None]

# Okabe and Ito's colors, which the color-blind can tell apart, with markers besides.
COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MIB = 2**20


@contextmanager
def progress_bar(title: str, steps: int, *, visible: bool) -> Iterator[Report]:
    """A bar that shows steps, loss and the last quality; nothing where there is no terminal.

    Args:
        title: shown before the bar.
        steps: in all.
        visible: False shows nothing, as on all workers but one.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    hidden = not (visible and console.is_terminal)
    with Progress(*columns, console=console, disable=hidden, transient=True) as bar:
        task = bar.add_task(title, total=steps, note="")

        def report(step: int, loss: float, quality: float) -> None:
            bar.update(task, completed=step, note=f"loss {loss:.3f}, quality {quality:.2f}")

        yield report


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file that is complete or not there."""
    with replacing(path) as file:
        file.write((json.dumps(content, indent=1, default=asdict) + "\n").encode())


def comparison_table(title: str, quality: str, runs: Mapping[str, Sequence[History]]) -> Table:
    """A table in the form of Table 3 of the PowerSGD paper.

    Args:
        title: of the task.
        quality: what quality means.
        runs: for each method the histories over the seeds; the first method is the baseline.
    """
    table = Table(title=title, title_justify="left")
    for column in ("Algorithm", quality.capitalize(), "Data sent per epoch", "Time per batch"):
        table.add_column(column, justify="left" if column == "Algorithm" else "right")
    baseline = next(iter(runs.values()))
    sent_by_baseline = baseline[0].bytes_per_epoch
    for method, histories in runs.items():
        mean, deviation = mean_and_deviation(histories)
        sent, time = histories[0].bytes_per_epoch, milliseconds(histories)
        table.add_row(
            method,
            f"{mean:.2f}" + (f" ± {deviation:.2f}" if len(histories) > 1 else ""),
            f"{sent / MIB:.2f} MB ({sent_by_baseline / sent:.0f}×)" if sent else "nothing",
            f"{time:.1f} ms ({100 * (time / milliseconds(baseline) - 1):+.0f}%)",
        )
    return table


def mean_and_deviation(histories: Sequence[History]) -> tuple[float, float]:
    """Of the final qualities; the deviation of a single one is 0."""
    final = [history.quality[-1] for history in histories]
    return statistics.mean(final), statistics.stdev(final) if len(final) > 1 else 0.0


def milliseconds(histories: Sequence[History]) -> float:
    """Of a batch, the median over the seeds."""
    return 1e3 * statistics.median(history.seconds_per_batch for history in histories)


def markdown(table: Table) -> str:
    """A table in Markdown, under its title."""
    rows = zip(*([column.header, *column.cells] for column in table.columns), strict=True)
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    lines.insert(1, f"|{'|'.join(rules)}|")
    return "\n".join([f"**{table.title}**", "", *lines, ""])


def plot_runs(path: Path, tasks: Mapping[str, tuple[str, Mapping[str, Sequence[History]]]]) -> None:
    """Quality against steps and against bytes sent, a row of two plots for each task.

    Lines are means over the seeds, shades go from the lowest to the highest.

    Args:
        path: of the image.
        tasks: for each task what quality means, and the histories by method.
    """
    figure, rows = pyplot.subplots(
        len(tasks), 2, figsize=(10, 3.6 * len(tasks)), squeeze=False, sharey="row"
    )
    for (title, (quality, runs)), (left, right) in zip(tasks.items(), rows, strict=True):
        for number, (method, histories) in enumerate(runs.items()):
            style = {**look(number), "markersize": 3}
            _draw(left, histories[0].steps, histories, method, style)
            sent = [max(size, 1) / MIB for size in histories[0].bytes_sent]
            _draw(right, sent, histories, method, style)
        left.set_title(title, loc="left")
        left.set_xlabel("steps")
        right.set_xlabel("MB sent by each worker")
        right.set_xscale("log")
        left.set_ylabel(quality)
        if "perplexity" in quality:
            best = min(min(h.quality) for histories in runs.values() for h in histories)
            left.set_ylim(0.9 * best, 4 * best)
        else:
            left.set_ylim(85, 100)
        left.legend(frameon=False)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    save_figure(path, figure)


def save_figure(path: Path, figure: Figure) -> None:
    """Writes an image and forgets the figure."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def look(number: int) -> dict[str, str]:
    """A color and a marker for each number, different ones up to 48."""
    count = len(COLORS)
    return {
        "color": COLORS[number % count],
        "marker": MARKERS[(number + number // count) % count],
    }


def _draw(
    axes: Axes,
    places: Sequence[float],
    histories: Sequence[History],
    label: str,
    style: Mapping[str, Any],
) -> None:
    # The first entry is the untrained model, which no scale could show beside the others.
    qualities = list(zip(*(history.quality for history in histories), strict=True))[1:]
    means = [statistics.mean(each) for each in qualities]
    axes.plot(places[1:], means, label=label, linewidth=1.2, **style)
    low, high = [min(each) for each in qualities], [max(each) for each in qualities]
    axes.fill_between(places[1:], low, high, color=style["color"], alpha=0.15, linewidth=0)
