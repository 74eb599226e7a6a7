"""The comparison of compressors at equal numbers of bytes, for as short as it allows."""

from pathlib import Path
from typing import Any

import pytest

from examples.budgets import budget_table
from examples.compare_compressors import candidates, parse_arguments
from examples.history import History
from examples.reporting import markdown
from tests.examples.test_example_data import write_cifar10
from tests.examples.test_examples import results_of, run

pytestmark = pytest.mark.xdist_group("processes")

SCRIPT = "examples/compare_compressors.py"
MATRICES = [(32, 9), (64, 288), (128, 576), (10, 512)]  # of the CNN for digits
VECTORS = 2 * (32 + 64 + 128) + 10
PARAMETERS = sum(n * m for n, m in MATRICES) + VECTORS
STEPS = 9  # 1,200 images over two workers in batches of 64


def bytes_within(rank: int) -> int:
    """What a step of PowerSGD of this rank sends, control words apart."""
    return 4 * (rank * sum(n + m for n, m in MATRICES) + VECTORS)


def sent_per_step(runs: dict[str, Any], control_words: int) -> dict[str, float]:
    """Without control words, those of the baseline apart, which has none."""
    sent = {}
    for number, (name, (history,)) in enumerate(runs.items()):
        each = history["bytes_sent"][-1] / history["steps"][-1]
        sent[name] = each - (4 * control_words if number else 0)
    return sent


def test_methods_of_a_budget_send_as_much_as_its_rank(tmp_path: Path) -> None:
    short = ["--workers", "2", "--epochs", "1", "--seeds", "1", "--batch-size", "64"]
    done = run(SCRIPT, *short, "--medium-rank", "3", "--all", "--output", str(tmp_path), workers=2)
    assert done.returncode == 0, done.stderr
    for words in ("Budget", "All-reduce", "Medium", "High", "Further", "Sign+Norm", "Signum"):
        assert words in done.stdout
    (runs,) = results_of(tmp_path, "compare_compressors")["runs"].values()
    assert {tuple(history["steps"]) for (history,) in runs.values()} == {(0, STEPS)}
    sent = sent_per_step(runs, control_words=11 + 2)
    assert sent.pop("No compression") == 4 * PARAMETERS
    for budget, rank in (("Medium", 3), ("High", 1)):
        assert sent.pop(f"{budget}: Rank {rank}") == bytes_within(rank)
        assert sent.pop(f"{budget}: Random Block") == bytes_within(rank)
        assert sent.pop(f"{budget}: Random K") == bytes_within(rank)
        # Pairs, and half of an odd number is rounded down.
        assert 0 <= bytes_within(rank) - sent.pop(f"{budget}: Top K") <= 4 * len(MATRICES)
    # One bit each in whole words, and a scale for each of the 11 parameters.
    assert sent.pop("Medium: Sign+Norm") == 4 * (-(-PARAMETERS // 32) + 11)
    assert len(sent) == 6 and all(name.startswith("Further: ") for name in sent)
    assert sent["Further: Rank 3, alternating"] < bytes_within(3)
    assert sent["Further: PowerSGD+, rank 3"] > bytes_within(3)


@pytest.mark.slow
def test_cifar10_has_the_budgets_of_the_paper(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    short = ["--data", str(tmp_path), "--workers", "1", "--epochs", "1", "--seeds", "1"]
    short += ["--batch-size", "5", "--only", "Top K", "--output", str(tmp_path)]
    done = run(SCRIPT, *short)
    assert done.returncode == 0, done.stderr
    (runs,) = results_of(tmp_path, "compare_compressors")["runs"].values()
    # 1/32 and 1/136 of the bytes: 32 and 8 MB in an epoch of the paper's 24 steps.
    assert sent_per_step(runs, control_words=62 + 1) == {
        "No compression": 0,  # by one worker
        "Medium: Top K": 1_396_752,
        "High: Top K": 328_608,
    }


def test_the_paper_s_table_is_the_default() -> None:
    names = [each.name for each in candidates(parse_arguments(["--data", "anywhere"]))]
    others = ["Random Block", "Random K"]
    medium, high = ["Rank 7", *others, "Sign+Norm", "Top K"], ["Rank 2", *others, "Top K"]
    by_budget = [f"Medium: {each}" for each in medium] + [f"High: {each}" for each in high]
    assert names == ["No compression", *by_budget]


def test_words_choose_methods_and_the_baseline_stays() -> None:
    chosen = candidates(parse_arguments(["--only", "sign", "rank 1"]))
    assert [each.name for each in chosen] == ["No compression", "Medium: Sign+Norm", "High: Rank 1"]
    with pytest.raises(ValueError, match="any of these words: Rank 9"):
        candidates(parse_arguments(["--only", "Rank 9"]))


def test_the_table_has_means_over_seeds_and_epochs() -> None:
    chosen = candidates(parse_arguments(["--only", "Sign", "Rank 1"]))
    # The last epoch sends the least: the mean over both counts.
    histories = [
        History(bytes_sent=[0, 3 * 2**19, 2**21], quality=[10, 50, quality], seconds_per_batch=time)
        for quality, time in ((90, 0.25), (96, 0.125))
    ]
    cheap = [History(bytes_sent=[0, 1024, 2048], quality=[10, 50, 70])]
    results = [histories, cheap, [History(bytes_sent=[0, 0, 0], quality=[10, 50, 60])]]
    runs = {each.name: own for each, own in zip(chosen, results, strict=True)}
    by_name = {each.name: each for each in chosen}
    table = budget_table("A task", "accuracy", runs, candidates=by_name)
    assert markdown(table).splitlines() == [
        "**A task**",
        "",
        "| Budget | Algorithm | Accuracy | Sent per epoch | Ratio | All-reduce | Time per batch |",
        "|---|---|---:|---:|---:|---:|---:|",
        "|  | No compression | 93.00 ± 4.24 | 1.00 MiB | 1.0× | yes | 187.5 ms |",
        "| Medium | Sign+Norm | 70.00 | 1.0 KiB | 1024.0× | no | 0.0 ms |",
        "| High | Rank 1 | 60.00 | nothing |  | yes | 0.0 ms |",
    ]
