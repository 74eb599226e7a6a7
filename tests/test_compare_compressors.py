"""The comparison of compressors at equal numbers of bytes, for as short as it allows."""

from pathlib import Path
from typing import Any

import pytest

from tests.test_example_data import write_cifar10
from tests.test_examples import results_of, run

pytestmark = pytest.mark.xdist_group("processes")

SCRIPT = "examples/compare_compressors.py"
MATRICES = [(32, 9), (64, 288), (128, 576), (10, 512)]  # of the CNN for digits
VECTORS = 2 * (32 + 64 + 128) + 10
PARAMETERS = sum(n * m for n, m in MATRICES) + VECTORS
STEPS = 37  # 1,200 images over two workers in batches of 16


def bytes_within(rank: int) -> int:
    """What a step of PowerSGD of this rank sends, control words apart."""
    return 4 * (rank * sum(n + m for n, m in MATRICES) + VECTORS)


def sent_per_step(runs: dict[str, Any]) -> dict[str, float]:
    return {
        name: histories[0]["bytes_sent"][-1] / histories[0]["steps"][-1]
        for name, histories in runs.items()
    }


def test_methods_of_a_budget_send_as_much_as_its_rank(tmp_path: Path) -> None:
    short = ["--workers", "2", "--epochs", "1", "--seeds", "2", "--markdown"]
    done = run(SCRIPT, *short, "--medium-rank", "3", "--all", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (runs,) = results_of(tmp_path, "compare_compressors")["runs"].values()
    assert all(len(histories) == 2 for histories in runs.values())
    assert {tuple(each["steps"]) for own in runs.values() for each in own} == {(0, STEPS)}
    sent = sent_per_step(runs)
    assert sent.pop("No compression") == 4 * PARAMETERS
    control = 4 * (11 + 2)  # a control word for each parameter, and two more
    for budget, rank in (("Medium", 3), ("High", 1)):
        assert sent.pop(f"{budget}: Rank {rank}") == bytes_within(rank) + control
        for name in ("Random Block", "Random K"):
            assert sent.pop(f"{budget}: {name}") == bytes_within(rank) + control
        top_k = sent.pop(f"{budget}: Top K")  # pairs: a tensor's budget may be odd
        assert 0 <= bytes_within(rank) + control - top_k <= 4 * len(MATRICES)
    # One bit each in whole words, and a scale for each of the 11 parameters.
    assert sent.pop("Medium: Sign+Norm") == 4 * (-(-PARAMETERS // 32) + 11) + control
    assert all(name.startswith("Further: ") for name in sent) and len(sent) == 6
    assert (
        sent["Further: Rank 3, alternating"] < bytes_within(3) < sent["Further: PowerSGD+, rank 3"]
    )


def test_the_table_is_markdown_and_says_what_is_averaged(tmp_path: Path) -> None:
    short = ["--workers", "2", "--epochs", "1", "--seeds", "1", "--markdown", "--only", "sign", "4"]
    done = run(SCRIPT, *short, "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line]
    header, rules, *methods = rows
    assert header[1:3] == ["Algorithm", "Test accuracy (%)"] and set("".join(rules)) == set("-:|")
    assert [[row[-6], row[-2]] for row in methods] == [
        ["No compression", "yes"],
        ["Rank 4", "yes"],
        ["Sign+Norm", "no"],
    ]


def test_cifar10_has_the_budgets_of_the_paper(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    short = ["--data", str(tmp_path), "--workers", "1", "--epochs", "1", "--seeds", "1"]
    short += ["--batch-size", "5", "--only", "Top K", "Random Block", "--output", str(tmp_path)]
    done = run(SCRIPT, *short)
    assert done.returncode == 0, done.stderr
    (runs,) = results_of(tmp_path, "compare_compressors")["runs"].values()
    control = 4 * (62 + 1)
    sent = {name: each - control for name, each in sent_per_step(runs).items()}
    assert sent.pop("No compression") == 4 * 11_173_962 - control
    # Floats of rank 7 and 2, and pairs for 1/32 and 1/136, of the sizes in the paper's Table 4.
    assert sent == {
        "Medium: Random Block": 1_055_540,
        "Medium: Top K": 1_396_752,
        "High: Random Block": 329_040,
        "High: Top K": 328_608,
    }


def test_words_that_no_method_has_are_refused() -> None:
    done = run(SCRIPT, "--only", "Rank 9")
    assert done.returncode != 0
    assert "any of these words: Rank 9" in done.stderr.splitlines()[-1]
