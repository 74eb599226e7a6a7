"""The comparison of fixed and adaptive ranks, for as short as it allows."""

from pathlib import Path

import pytest

from examples.adaptation import adaptation_table
from examples.adaptive_rank import comparison, parse_arguments
from examples.history import History
from examples.reporting import markdown
from tests.test_examples import results_of, run

pytestmark = pytest.mark.xdist_group("processes")

METHODS = ["Rank 4", "Rank 2", "Accordion", "L-GreCo", "L-GreCo and Accordion"]
# Of each task: matrices that are compressed, numbers that are not, parameters.
SHAPES = {
    "Image": ([(32, 9), (64, 288), (128, 576), (10, 512)], 2 * (32 + 64 + 128) + 10, 11),
    "Language": ([(500, 64), (256, 64), (256, 64)], 2 * 256 + 500, 6),
}


def floats_of_steps(history: History, method: str, title: str) -> int:
    """What all steps send with the ranks that the history has, control words of two workers too."""
    matrices, vectors, parameters = SHAPES[title.split()[0]]
    ends = [*history.windows[1:], history.steps[-1]] if history.windows else history.steps[-1:]
    starts = history.windows or [0]
    fixed = int(method[-1]) if method.startswith("Rank") else None
    total = 0
    for window, (start, end) in enumerate(zip(starts, ends, strict=True)):
        own = [ranks[window] for ranks in history.ranks.values()] or [fixed] * len(matrices)
        low_rank = sum(
            min(rank * (n + m), n * m) for rank, (n, m) in zip(own, matrices, strict=True)
        )
        total += (end - start) * (low_rank + vectors + parameters + 2)
    return total


def test_what_is_sent_are_steps_of_the_ranks_that_are_shown_and_decisions(tmp_path: Path) -> None:
    short = ["--workers", "2", "--epochs", "2", "--seeds", "1", "--batch-size", "64"]
    done = run("examples/adaptive_rank.py", *short, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for words in (*METHODS, "Test perplexity", "million floats", "Of it decisions", "seconds"):
        assert words in done.stdout
    changes: dict[str, int] = {}
    for title, runs in results_of(tmp_path, "adaptive_rank")["runs"].items():
        assert list(runs) == METHODS
        for method, (content,) in runs.items():
            history = History(**content)
            steps = 4 * floats_of_steps(
                history, int(method[5:] or 0) if "Rank" in method else 0, title
            )
            assert history.bytes_sent[-1] == steps + history.decision_bytes_sent
            assert (history.decision_bytes_sent > 0) == (not method.startswith("Rank"))
            assert history.seconds > 0
            varied = [ranks for ranks in history.ranks.values() if len(set(ranks)) > 1]
            changes[method] = changes.get(method, 0) + len(varied)
    assert min(changes[method] for method in METHODS[2:]) > 0
    assert changes["Rank 4"] == changes["Rank 2"] == 0


def test_the_paper_s_ranks_and_windows_are_those_of_cifar10() -> None:
    chosen = comparison(parse_arguments(["--data", "anywhere"]))
    assert list(chosen.methods) == ["Rank 2", "Rank 1", *METHODS[2:]]
    assert [each.settings.windows_per_epoch for each in chosen.subjects] == [1]
    choices = [make.keywords["choices"] for make in chosen.schedulers.values()]
    assert {(each.low, each.high) for each in choices} == {(1, 2)}
    assert {each.accordion["interval"] for each in choices} == {10}
    chosen = comparison(parse_arguments(["--low-rank", "3", "--high-rank", "5"]))
    assert list(chosen.methods)[:2] == ["Rank 5", "Rank 3"]
    assert {make.keywords["choices"].low for make in chosen.schedulers.values()} == {3}
    assert {make.keywords["choices"].high for make in chosen.schedulers.values()} == {5}


def test_the_table_has_ratios_to_the_first_method_and_the_part_of_decisions() -> None:
    high = [
        History(bytes_sent=[0, 3 * 2**20, size], quality=[10, 50, quality], seconds=seconds)
        for size, quality, seconds in ((12_000_000, 90, 30.0), (12_000_000, 96, 50.0))
    ]
    adaptive = [
        History(
            bytes_sent=[0, 100, size], quality=[10, 50, quality], seconds=seconds,
            decision_bytes_sent=decisions, windows=[0],
        )
        for size, quality, seconds, decisions in (
            (6_000_000, 91, 70.0, 600_000), (10_000_000, 93, 90.0, 2_000_000),
        )
    ]  # fmt: skip
    runs = {"Rank 9": high, "Something": adaptive, "Once": adaptive[:1]}
    assert markdown(adaptation_table("A task", "accuracy", runs)).splitlines() == [
        "**A task**",
        "",
        "| Rank | Accuracy | Data sent (million floats) | Of it decisions | Time (seconds) |",
        "|---|---:|---:|---:|---:|",
        "| Rank 9 | 93.00 ± 4.24 | 3.000 (1×) |  | 40.0 (1×) |",
        "| Something | 92.00 ± 1.41 | 2.000 (1.5×) | 15.0 % | 80.0 (0.5×) |",
        "| Once | 91.00 | 1.500 (2×) | 10.0 % | 70.0 (0.571×) |",
    ]
