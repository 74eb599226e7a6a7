"""The example that attacks what is sent: its cases, its tables and its pictures."""

import json
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest
import torch

from examples.audit import (
    file_name,
    main,
    named,
    parse_arguments,
    parts,
    picture,
    scores,
    spread,
    ssim_table,
)
from examples.audit_cases import COMPRESSORS, Case, audit, images
from examples.audit_membership import METHODS, Outcome, membership_table, train
from examples.reporting import markdown
from tests.launcher import ROOT


def test_a_part_makes_a_table_a_picture_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    title = "Digits, MLP, 1 image"
    words = ["--parts", title, "--repeats", "1", "--iterations", "1", "--processes", "1"]
    main(parse_arguments([*words, "--markdown", "--output", str(tmp_path)]))
    printed = capsys.readouterr().out
    assert f"**{title}: SSIM, of a blind guess " in printed and "no proof" in printed
    # What is read from the first layer of one image needs no search.
    assert "| SGD | 19,260 |" in printed and "| Rank 1 | 1,124 |" in printed
    path = tmp_path / f"audit-{file_name(title)}.json"
    cases = json.loads(path.read_text())["cases"]
    assert [case["method"] for case in cases] == [
        "SGD", "Rank 1", "Top-K 10 %", "Top-K 1 %", "Sign",
    ]  # fmt: skip
    assert cases[0]["reports"][0]["best"] == "by biases"
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_best_of_each_kind_of_attack_counts() -> None:
    found = audit(Case("faces", "MLP", 1, "Top-K 1 %", iterations=1))
    by_name = {row.attack: row.score for row in found.rows}
    assert scores([found, found], "naive") == 2 * [max(by_name["naive"], by_name["naive, smooth"])]
    assert scores([found], "blind guess") == [found.blind.score]
    assert spread([0.5]) == "0.50" and spread([0.5, 0.7]) == "0.60 ± 0.14"


def test_the_whole_has_all_methods_and_settings() -> None:
    [(_, first)] = parts(parse_arguments([])).items()
    whole = [case for each in parts(parse_arguments(["--full"])).values() for case in each]
    assert set(first) < set(whole)
    assert {case.method for case in whole} == set(COMPRESSORS)
    assert {case.batch_size for case in whole} == {1, 2, 4, 8}
    assert {case.model for case in whole} == {"MLP", "convolutions"}
    assert {case.data for case in whole} == {"faces", "digits"}
    assert {case.noise_multiplier for case in whole} == {None, 0.0, 0.001, 0.01, 0.1}
    assert {case.steps for case in whole} == {1, 4, 16}
    assert {case.workers for case in whole} == {1, 4}


def test_averages_have_a_row_of_their_own(tmp_path: Path) -> None:
    cases = [
        Case("digits", "MLP", 2, method, workers=2, iterations=1)
        for method in ("Rank 1", "Top-K 10 %")
    ]
    results = {case: [audit(case)] for case in cases}
    assert list(named(results)) == ["Rank 1", "Rank 1, averages", "Top-K 10 %"]
    table = markdown(ssim_table("Digits", results))
    assert table.count("averages") == 1
    [each] = results[cases[0]]
    assert torch.equal(each.originals, images("digits")[:2])
    assert each.averages is not None
    assert torch.equal(each.averages.originals, images("digits")[:4])
    picture(tmp_path / "picture.png", results)


def test_the_table_of_membership() -> None:
    outcomes = [
        Outcome(method, seed, 90.0 + seed, 0.5, 0.0, 0.6)
        for method in ("SGD", "SGD, σ = 1")
        for seed in range(3)
    ]
    lines = markdown(membership_table(outcomes)).splitlines()
    deviation = statistics.stdev([90, 91, 92])
    assert lines[4] == (
        f"| SGD | 91.0 ± {deviation:.1f} | 0.500 ± 0.000 | 0.000 ± 0.000 | 0.600 ± 0.000 |  |"
    )
    assert lines[5].endswith("| 0.760 |") and len(lines) == 6
    assert set(METHODS) > {"SGD", "Sign", "SGD, σ = 4"}


def test_a_training_says_who_was_in_its_batches() -> None:
    plain, noisy = (train(method, 0, epochs=1) for method in ("Rank 4", "SGD, σ = 4"))
    assert plain.batch_auc > 0.6 > noisy.batch_auc and plain.seed == 0
    assert 0 < plain.loss_tpr + plain.loss_auc < 2 and 0 < plain.accuracy < 100


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_has_a_target_for_each() -> None:
    def commands(target: str) -> list[str]:
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return [line for line in done.stdout.splitlines() if "examples/audit.py" in line]

    [demo], [full] = commands("demo-audit"), commands("demo-audit-full")
    assert "--full" not in demo and "--full" in full
