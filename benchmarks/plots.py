"""Plots of the results."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # writes files, needs no screen

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.candidates import Candidate
from benchmarks.growth import predictions
from benchmarks.timing import Quartiles, Row
from efsgd.planning import Link

LABELS = {
    "copy": "a copy",
    "ddp-sgd": "SGD under DDP",
    "epfml": "epfml/powersgd",
    "hook": "PyTorch's hook",
    "hook-batched": "PyTorch's hook, batched",
    "sgd-foreach": "SGD(foreach=True)",
    "sgd-fused": "SGD(fused=True)",
    "sgd-loop": "SGD(foreach=False)",
}
STYLE = "tableau-colorblind10"
MARKERS = "os^Dv<>p"
Rows = Sequence[tuple[Candidate, Row]]


def label_of(candidate: Candidate, *, with_rank: bool = True) -> str:
    """What a candidate is called in tables and plots."""
    parts = [LABELS.get(candidate.kind, candidate.kind)]
    if with_rank and candidate.rank is not None:
        parts.append(f"rank {candidate.rank}")
    if candidate.form is not None:
        parts.append("SGD's momentum" if candidate.form == "sgd" else "the paper's momentum")
    if candidate.compiled:
        parts.append("compiled")
    return ", ".join(parts)


def plot_times(path: Path, panels: Mapping[str, Rows]) -> None:
    """Milliseconds over rank, a line for each implementation, a panel for each run.

    Args:
        path: of the image.
        panels: by title; candidates without rank become horizontal lines.
    """
    figure, plots = _panels(len(panels), sharey=True)
    for axes, (title, rows) in zip(plots, panels.items(), strict=True):
        by_rank: dict[str, list[tuple[int, Quartiles]]] = defaultdict(list)
        level = 0
        for candidate, row in rows:
            label = label_of(candidate, with_rank=False)
            if candidate.rank is None:
                style = ("-", "--", ":", "-.")[level % 4]
                axes.axhline(1e3 * row.net.median, label=label, color="black", linestyle=style)
                level += 1
            else:
                by_rank[label].append((candidate.rank, row.net.scaled(1e3)))
        listed = sorted({c.rank for c, _ in rows if c.rank is not None})
        for number, (label, points) in enumerate(by_rank.items()):
            ranks, spreads = zip(*sorted(points, key=lambda point: point[0]), strict=True)
            # At one rank they stand side by side, where several would be lines.
            places = ranks if len(listed) > 1 else [number - (len(by_rank) - 1) / 2]
            _line(axes, places, spreads, label=label, marker=MARKERS[number % len(MARKERS)])
        _scales(axes, listed, "rank", title)
        if len(listed) == 1:
            axes.set_xticks([0], [str(listed[0])])
            axes.set_xlim(-len(by_rank), len(by_rank))
    plots[0].set_ylabel("ms per step")
    _save(figure, path, plots[0])


def plot_rates(path: Path, panels: Mapping[str, Rows]) -> None:
    """Exchange and update as bars, a panel for each network, each on a scale of its own.

    Args:
        path: of the image.
        panels: by title: one row for each implementation.
    """
    figure, plots = _panels(len(panels))
    for axes, (title, rows) in zip(plots, panels.items(), strict=True):
        spreads = [row.net.scaled(1e3) for _, row in rows]
        labels = [label_of(candidate, with_rank=False) for candidate, _ in rows]
        bars = axes.barh(labels, [spread.median for spread in spreads], color="#006BA4")
        axes.bar_label(bars, [f"{spread.median:.0f}" for spread in spreads], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_title(title)
        axes.set_xlabel("exchange + update of a step, ms")
        axes.spines[["top", "right"]].set_visible(False)
        if axes is not plots[0]:
            axes.set_yticklabels([])
    figure.set_figheight(2.4)
    _save(figure, path)


def plot_memory(path: Path, panels: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Peaks as bars.

    Args:
        path: of the image.
        panels: by title: `label`, `peak` and `kept` of each candidate.
    """
    figure, plots = _panels(len(panels))
    for axes, (title, rows) in zip(plots, panels.items(), strict=True):
        labels = [row["label"] for row in rows]
        axes.barh(labels, [row["peak"] for row in rows], label="peak", color="#A2C8EC")
        axes.barh(labels, [row["kept"] for row in rows], label="between steps", color="#006BA4")
        axes.invert_yaxis()
        axes.set_title(title)
        axes.set_xlabel("times the bytes of the parameters")
        if axes is not plots[0]:
            axes.set_yticklabels([])
    _save(figure, path, plots[0])


def plot_workers(path: Path, launches: Sequence[Mapping[str, Any]]) -> None:
    """Measured times of the two all-reduces over the number of workers, and those predicted.

    Args:
        path: of the image.
        launches: as in the file of `growth workers`.
    """
    figure, (axes,) = _panels(1)
    workers = [launch["workers"] for launch in launches]
    for number, points in enumerate(zip(*map(predictions, launches), strict=True)):
        title = points[0].title
        spreads = [point.seconds.scaled(1e3) for point in points]
        drawn = _line(axes, workers, spreads, label=title, marker=MARKERS[number], line="none")
        predicted = [1e3 * point.predicted for point in points]
        axes.plot(workers, predicted, color=drawn, label=f"{title}, predicted")
    _scales(axes, workers, "workers", "the two all-reduces of a step")
    axes.set_ylabel("ms")
    _save(figure, path, axes)


def plot_ranks(
    path: Path, panels: Mapping[str, Sequence[Mapping[str, Any]]], wire: Link | None
) -> None:
    """What a step is made of, over the rank.

    Args:
        path: of the image.
        panels: by title: `ranks` as in the file of `growth ranks`.
        wire: for the time of the bytes sent; None leaves it out.
    """
    figure, plots = _panels(len(panels))
    for axes, (title, rows) in zip(plots, panels.items(), strict=True):
        positions = [str(row["rank"]) for row in rows]
        step = [1e3 * Quartiles.of(row["step"]).median for row in rows]
        part = [1e3 * Quartiles.of(row["orthogonalization"]).median for row in rows]
        rest = [whole - alone for whole, alone in zip(step, part, strict=True)]
        axes.bar(positions, rest, label="other computation")
        axes.bar(positions, part, bottom=rest, label="orthogonalization")
        if wire is not None:
            times = [1e3 * sum(map(wire.seconds, row["messages"])) for row in rows]
            axes.bar(positions, times, bottom=step, label="two all-reduces (α–β model)")
        axes.set_title(title)
        axes.set_xlabel("rank")
    plots[0].set_ylabel("ms per step")
    _save(figure, path, plots[0])


def _panels(count: int, *, sharey: bool = False) -> tuple[Figure, list[Axes]]:
    pyplot.style.use(STYLE)
    size = max(6.4, 4.2 * count), 4.2
    figure, grid = pyplot.subplots(1, count, figsize=size, squeeze=False, sharey=sharey)
    return figure, list(grid[0])


def _line(
    axes: Axes,
    places: Sequence[float],
    spreads: Sequence[Quartiles],
    *,
    label: str,
    marker: str,
    line: str = "-",
) -> Any:
    """Medians with the quartiles as error bars. Returns the color."""
    medians = [spread.median for spread in spreads]
    errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
    drawn = axes.errorbar(
        places, medians, errors, label=label, marker=marker, linestyle=line, capsize=2
    )
    return drawn[0].get_color()


def _scales(axes: Axes, places: Sequence[int], name: str, title: str) -> None:
    if len(places) > 1:  # a single place has no scale
        axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(FuncFormatter(_some_minor_labels))
    axes.set_xticks(places, [str(place) for place in places])
    axes.set_xlabel(name)
    axes.set_title(title)
    axes.grid(True, which="both", axis="y", alpha=0.3)


def _some_minor_labels(value: float, _: int) -> str:
    """Labels of 2 and 5 on a logarithmic scale; all others would not fit."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _save(figure: Figure, path: Path, legend_of: Axes | None = None) -> None:
    """Writes the image, with one legend for all panels below them if there is to be one."""
    if legend_of is not None:
        figure.legend(
            *legend_of.get_legend_handles_labels(),
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=3,
            fontsize="small",
        )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)
