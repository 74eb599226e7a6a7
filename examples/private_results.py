"""What private training achieves: tables, and a plot of accuracy against ε and bytes."""

import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator
from rich.table import Table

from efsgd.privacy import epsilon
from examples.private_tuning import NONE, Case, Outcome
from examples.reporting import look, save_figure

DELTA = 1e-5
Results = Mapping[Case, Sequence[Outcome]]


@cache
def _epsilon(noise_multiplier: float, sample_rate: float, steps: int) -> float:
    return epsilon(noise_multiplier, sample_rate, steps, DELTA)


def epsilon_after(case: Case, steps: int) -> float:
    """The ε of these steps against whoever sees all messages, or the model."""
    return _epsilon(case.noise_multiplier, case.sample_rate, steps)


def accuracy_table(title: str, results: Results) -> Table:
    """A row for each case, below the others with as much noise.

    "Beside none" is the difference from training without compression with the same noise and
    seeds, so of the same first values, batches and noise.
    """
    table = Table(title=title, title_justify="left")
    for column in ("σ", "ε"):
        table.add_column(column, justify="right")
    for column in ("Compression", "Error feedback"):
        table.add_column(column)
    for column in ("Learning rate", "Test accuracy (%)", "Beside none", "Sent per step"):
        table.add_column(column, justify="right")
    baselines = {c.noise_multiplier: own for c, own in results.items() if c.compression == NONE}
    last = math.nan
    for case, outcomes in results.items():
        is_new, last = case.noise_multiplier != last, case.noise_multiplier
        if is_new:
            table.add_section()
        spent, baseline = epsilon_after(case, case.steps), baselines[case.noise_multiplier]
        is_none = case.compression == NONE
        sent = outcomes[0].bytes_sent[-1] / case.steps
        uncompressed = baseline[0].bytes_sent[-1] / case.steps
        table.add_row(
            f"{case.noise_multiplier:g}" if is_new else "",
            f"{spent:.2f}".replace("inf", "∞") if is_new else "",
            case.compression,
            "" if is_none else ("yes" if case.error_feedback else "no"),
            f"{outcomes[0].trial.lr:g}",
            _mean(_finals(outcomes), ""),
            "" if is_none else _mean(gains(outcomes, baseline), "+"),
            f"{sent:,.0f} bytes" + ("" if is_none else f" ({uncompressed / sent:.1f}×)"),
        )
    return table


def gains(outcomes: Sequence[Outcome], baseline: Sequence[Outcome]) -> list[float]:
    """Differences of final accuracies, seed by seed."""
    pairs = zip(_finals(outcomes), _finals(baseline), strict=True)
    return [own - other for own, other in pairs]


def _finals(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.test[-1] for outcome in outcomes]


def _mean(values: Sequence[float], sign: str) -> str:
    mean = f"{statistics.mean(values):{sign}.1f}"
    return mean + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def plot_accuracy(path: Path, results: Results) -> None:
    """Accuracy against ε as training goes on, and at its end against bytes; a row for each noise.

    Lines and points are means over the seeds, bars one standard deviation each way. The thin dashed
    line is training with neither noise nor compression, where that was done.

    Args:
        path: of the image.
        results: by case; those without noise have no ε, and no row.
    """
    noises = sorted({case.noise_multiplier for case in results} - {0.0})
    names = list(dict.fromkeys(case.compression for case in results))
    looks = {name: look(number) for number, name in enumerate(names)}
    figure, rows = pyplot.subplots(
        len(noises), 2, figsize=(11, 4 * len(noises)), squeeze=False, sharey="row"
    )
    plain = [own for c, own in results.items() if not c.noise_multiplier and c.compression == NONE]
    for noise, (left, right) in zip(noises, rows, strict=True):
        for case, outcomes in results.items():
            if case.noise_multiplier == noise:
                _draw(left, right, case, outcomes, looks[case.compression])
        left.set_title(f"Noise σ = {noise:g}", loc="left")
        left.set_xlabel("ε against whoever sees all messages")
        left.set_ylabel("test accuracy (%)")
        right.set_xlabel("KiB sent by each worker in the whole training")
        right.set_xscale("log")
        right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.xaxis.set_major_formatter("{x:g}")
        right.xaxis.set_minor_formatter("")
        for axes in (left, right):
            if plain:
                level = statistics.mean(_finals(plain[0]))
                axes.axhline(level, color="#000000", linewidth=0.8, linestyle="--", zorder=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25)
    rows[0, 1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_figure(path, figure)


def _draw(
    left: Axes, right: Axes, case: Case, outcomes: Sequence[Outcome], style: Mapping[str, Any]
) -> None:
    """Empty markers and dotted lines are those without error feedback."""
    has_feedback = case.error_feedback
    look_of_it = {**style, "markerfacecolor": style["color"] if has_feedback else "white"}
    label = case.compression + ("" if has_feedback else ", no error feedback")
    tests = list(zip(*(outcome.test for outcome in outcomes), strict=True))
    means = [statistics.mean(each) for each in tests]
    places = [epsilon_after(case, step) for step in outcomes[0].steps]
    line = "-" if has_feedback else ":"
    left.plot(places, means, linestyle=line, linewidth=1.2, markersize=5, **look_of_it)
    deviation = statistics.stdev(tests[-1]) if len(outcomes) > 1 else 0.0
    sent = outcomes[0].bytes_sent[-1] / 2**10
    right.errorbar(
        [sent], means[-1:], [deviation], label=label, capsize=3, linestyle="none", markersize=6,
        **look_of_it,
    )  # fmt: skip
