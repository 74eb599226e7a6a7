"""The comparison of fixed and adaptive ranks, for as short as it allows."""

from pathlib import Path

import pytest
import torch

from examples.adaptation import adaptation_table, plot_ranks
from examples.adaptive_rank import comparison, parse_arguments
from examples.distributed import Workers
from examples.history import History
from examples.reporting import markdown
from examples.training import Training, prepare, seed_worker
from tests.checkpoint.killed_worker import make_task
from tests.examples.test_examples import results_of, run

pytestmark = pytest.mark.xdist_group("processes")

ALONE = Workers(0, 1, torch.device("cpu"))
METHODS = ["Rank 4", "Rank 2", "Accordion", "L-GreCo", "L-GreCo and Accordion"]
# Of the task in `make_task`: matrices that are compressed, numbers that are not, parameters.
MATRICES = [(4, 9), (8, 36), (16, 72), (10, 64)]
VECTORS, PARAMETERS = 2 * (4 + 8 + 16) + 10, 11


def floats_of_steps(history: History, fixed: int) -> int:
    """What all steps of one worker send with the ranks that the history has, or the fixed one."""
    starts = history.windows or [0]
    ends = [*starts[1:], history.steps[-1]]
    total = 0
    for window, (start, end) in enumerate(zip(starts, ends, strict=True)):
        own = [ranks[window] for ranks in history.ranks.values()] or [fixed] * len(MATRICES)
        sizes = zip(own, MATRICES, strict=True)
        low_rank = sum(int(min(rank * (n + m), n * m)) for rank, (n, m) in sizes)
        total += (end - start) * (low_rank + VECTORS + PARAMETERS + 1)  # and control words
    return total


def test_what_is_sent_are_steps_of_the_ranks_that_are_shown_and_decisions() -> None:
    chosen = comparison(parse_arguments(["--low-rank", "1", "--high-rank", "2"]))
    assert list(chosen.methods) == ["Rank 2", "Rank 1", *METHODS[2:]]
    sent = {}
    for (method, make), fixed in zip(chosen.methods.items(), (2, 1, 0, 0, 0), strict=True):
        prepare(ALONE, seed=3)
        task, model, settings = make_task("images", ALONE)
        model, optimizer = make(model, settings, 3, ALONE)
        make_scheduler = chosen.schedulers.get(method)
        scheduler = None if make_scheduler is None else make_scheduler(optimizer)
        seed_worker(3, 0)
        history = Training(task, model, optimizer, settings, ALONE, 3, scheduler).run()
        decided = history.decision_bytes_sent
        assert history.bytes_sent[-1] == 4 * floats_of_steps(history, fixed) + decided
        assert (decided > 0) == (not fixed)
        varied = [len(set(ranks)) > 1 for ranks in history.ranks.values()]
        assert any(varied) == (not fixed)
        assert history.seconds > 0
        sent[method] = history.bytes_sent[-1] - decided
    assert sent["Rank 1"] < sent["Accordion"] < sent["Rank 2"]
    assert sent["L-GreCo"] < sent["Rank 2"]


def test_the_script(tmp_path: Path) -> None:
    short = ["--workers", "2", "--epochs", "1", "--seeds", "1", "--batch-size", "256"]
    done = run("examples/adaptive_rank.py", *short, "--output", str(tmp_path), workers=2)
    assert done.returncode == 0, done.stderr
    for words in (*METHODS, "Test perplexity", "million floats", "Of it decisions", "seconds"):
        assert words in done.stdout
    images, words = results_of(tmp_path, "adaptive_rank")["runs"].values()
    for runs, windows in ((images, 1), (words, 4)):
        assert list(runs) == METHODS
        counts = [len(history["windows"]) for (history,) in runs.values()]
        assert counts == [0, 0, windows, windows, windows]
    (history,) = words["Accordion"]
    assert list(history["ranks"]) == [
        "parameter 0 (encoder.weight)",
        "parameter 1 (lstm.weight_ih_l0)",
        "parameter 2 (lstm.weight_hh_l0)",
    ]
    assert history["decision_bytes_sent"] > 0


def test_the_paper_s_ranks_and_windows_are_those_of_cifar10() -> None:
    chosen = comparison(parse_arguments(["--data", "anywhere"]))
    assert list(chosen.methods) == ["Rank 2", "Rank 1", *METHODS[2:]]
    assert [each.settings.windows_per_epoch for each in chosen.subjects] == [1]
    choices = [make.keywords["choices"] for make in chosen.schedulers.values()]
    assert {(each.low, each.high, each.accordion["interval"]) for each in choices} == {(1, 2, 10)}


def test_the_interval_of_accordion_may_be_given() -> None:
    chosen = comparison(parse_arguments(["--interval", "1"]))
    choices = [make.keywords["choices"] for make in chosen.schedulers.values()]
    assert {each.accordion["interval"] for each in choices} == {1}
    assert {each.l_greco["interval"] for each in choices} == {5}


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
        "| Something | 92.00 ± 1.41 | 2.000 (1.5×) | 15.00 % | 80.0 (0.5×) |",
        "| Once | 91.00 | 1.500 (2×) | 10.00 % | 70.0 (0.571×) |",
    ]


def test_the_plot_takes_tasks_with_different_numbers_of_layers(tmp_path: Path) -> None:
    def history(layers: int) -> History:
        ranks = {f"parameter {number} (weight)": [4.0, 2.0] for number in range(layers)}
        return History(steps=[0, 8], windows=[0, 4], lrs=[0.1, 0.01], ranks=ranks)

    tasks = {
        f"{layers} layers": ("accuracy", {"Fixed": [History()], "Adaptive": [history(layers)]})
        for layers in (1, 3)
    }
    plot_ranks(tmp_path / "plot.png", tasks)
    assert (tmp_path / "plot.png").stat().st_size > 10_000
