"""What methods achieve whose ranks change while training goes on: a table and a plot."""

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from examples.history import History
from examples.reporting import look, mean_and_deviation, save_figure


def adaptation_table(title: str, quality: str, runs: Mapping[str, Sequence[History]]) -> Table:
    """A table in the form of Tables 1 and 2 of the Accordion paper.

    Sent is what one worker hands to collectives in the whole training, in units of 4 bytes: steps,
    with their control words, and decisions. Ratios are those of the first method to each.

    Args:
        title: of the task.
        quality: what quality means.
        runs: for each method the histories over the seeds, that of the high rank first.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("Rank", no_wrap=True)
    columns = (quality.capitalize(), "Data sent (million floats)", "Of it decisions")
    for column in (*columns, "Time (seconds)"):
        table.add_column(column, justify="right")
    baseline = next(iter(runs.values()))
    for method, histories in runs.items():
        mean, deviation = mean_and_deviation(histories)
        sent, seconds = _floats(histories), _seconds(histories)
        decisions = statistics.mean(h.decision_bytes_sent / h.bytes_sent[-1] for h in histories)
        table.add_row(
            method,
            f"{mean:.2f}" + (f" ± {deviation:.2f}" if len(histories) > 1 else ""),
            f"{sent / 1e6:.3f} ({_ratio(_floats(baseline), sent)})",
            f"{100 * decisions:.2f} %" if histories[0].windows else "",
            f"{seconds:.1f} ({_ratio(_seconds(baseline), seconds)})",
        )
    return table


def plot_ranks(
    path: Path, tasks: Mapping[str, tuple[str, Mapping[str, Sequence[History]]]]
) -> None:
    """The rank of each layer over the steps, below the learning rate; a column for each task.

    It shows the first seed of each method that has a scheduler.

    Args:
        path: of the image.
        tasks: for each task what quality means, and the histories by method.
    """
    columns = {
        title: {method: each[0] for method, each in runs.items() if each[0].windows}
        for title, (_, runs) in tasks.items()
    }
    layers = {title: list(next(iter(found.values())).ranks) for title, found in columns.items()}
    count = 1 + max(map(len, layers.values()))
    count = 1 + max(map(len, layers.values()))
    figure, rows = pyplot.subplots(
        count, len(columns), figsize=(6 * len(columns), 1.15 * count + 0.6), squeeze=False
    )
    for number, (title, histories) in enumerate(columns.items()):
        top, *others = (row[number] for row in rows)
        shown = others[: len(layers[title])]
        for name, axes in zip(layers[title], shown, strict=True):
            _draw_layer(axes, name, histories)
        _draw_lr(top, next(iter(histories.values())))
        top.set_title(title, loc="left", fontsize=10)
        top.legend(*shown[0].get_legend_handles_labels(), frameon=False, fontsize=7)
        for axes in (top, *shown[:-1]):
            axes.tick_params(labelbottom=False)
        shown[-1].set_xlabel("steps")
        for axes in others[len(shown) :]:
            axes.set_visible(False)
    save_figure(path, figure)


def _draw_lr(axes: Axes, history: History) -> None:
    """The learning rate with which each window began."""
    axes.plot(*_until_the_end(history, history.lrs), color="#000000", drawstyle="steps-post")
    axes.set_ylim(0, 1.4 * max(history.lrs))
    _finish(axes, "learning rate")


def _draw_layer(axes: Axes, name: str, histories: Mapping[str, History]) -> None:
    """A layer's ranks by all methods; later lines are thinner, as they may lie on others."""
    for number, (method, history) in enumerate(histories.items()):
        axes.plot(
            *_until_the_end(history, history.ranks[name]),
            label=method, color=look(number + 1)["color"], drawstyle="steps-post",
            linewidth=2 * (len(histories) - number) - 0.6,
        )  # fmt: skip
    found = re.fullmatch(r".*\((.*)\)", name)
    highest = max(max(ranks) for history in histories.values() for ranks in history.ranks.values())
    axes.set_ylim(0, 1.25 * highest)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    _finish(axes, f"rank of {found[1] if found else name}")


def _finish(axes: Axes, label: str) -> None:
    axes.text(0.01, 0.96, label, transform=axes.transAxes, fontsize=8, va="top")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def _until_the_end(history: History, values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Windows' first steps and their values, and the last once more where training ends."""
    return [*history.windows, history.steps[-1]], [*values, values[-1]]


def _floats(histories: Sequence[History]) -> float:
    return statistics.mean(history.bytes_sent[-1] for history in histories) / 4


def _seconds(histories: Sequence[History]) -> float:
    return statistics.mean(history.seconds for history in histories)


def _ratio(first: float, other: float) -> str:
    """How many times as much the first is."""
    return f"{first / other:.3g}×" if other else "nothing"
