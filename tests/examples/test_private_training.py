"""Private training with compression: what is trained, how rates are tuned, and what is shown."""

import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from efsgd import PowerSGD
from efsgd.testing import step_together
from examples.private_results import DELTA, accuracy_table, epsilon_after, gains, plot_accuracy
from examples.private_training import (
    WORKERS,
    grid,
    load,
    make_worker,
    parse_arguments,
    parts,
    train,
)
from examples.private_tuning import NONE, RECORDS, Case, Outcome, Trial, Tuning
from examples.reporting import markdown
from tests.examples.test_examples import results_of, run
from tests.launcher import ROOT

RANK_1 = Case(4.0, "Rank 1", True, batch_size=64, steps=3)


def test_a_training_sends_what_it_would_without_noise_and_can_be_repeated() -> None:
    first, again = (train(Trial(RANK_1, lr=1.0, seed=1)) for _ in range(2))
    assert first == again
    assert train(Trial(RANK_1, lr=1.0, seed=2)).test != first.test
    assert first.steps == list(RANK_1.tested_at()) == [1, 2, 3]
    shapes = [(64, 64), (64,), (10, 64), (10,)]
    words = first.bytes_sent[0] - PowerSGD(1).payload_bytes(
        shapes
    )  # of control: one per tensor ...
    assert words == 4 * (len(shapes) + WORKERS)  # ... and per worker
    assert first.bytes_sent == [step * first.bytes_sent[0] for step in first.steps]


def test_workers_stay_equal_and_say_the_epsilon_of_the_table() -> None:
    workers = [make_worker(Trial(RANK_1, 1.0, 1), worker) for worker in range(WORKERS)]
    for batches in zip(*(loader for *_, loader in workers), strict=True):
        for (model, optimizer, _), (images, labels) in zip(workers, batches, strict=True):
            optimizer.zero_grad()
            images.requires_grad_()  # or torch warns of Opacus's hooks
            torch.nn.functional.cross_entropy(model(images), labels).backward()
        step_together([optimizer for _, optimizer, _ in workers])
    first = list(workers[0][0].parameters())
    for model, *_ in workers[1:]:
        assert all(map(torch.equal, first, model.parameters()))
    spent = workers[0][1].guarantees(DELTA)["messages"]["prv"]
    assert spent == epsilon_after(RANK_1, RANK_1.steps)


def test_no_image_is_in_two_parts_or_shards() -> None:
    images = torch.cat([load()[part][0] for part in ("training", "validation", "test")])
    assert images.shape == (1797, 64) and float(images.min()) == -1.0 and float(images.max()) == 1.0
    assert len(load()["training"][1]) == RECORDS and len(load()["validation"][1]) == 240
    shards = [make_worker(Trial(RANK_1, 1.0, 1), worker)[2].dataset for worker in range(WORKERS)]
    together = torch.cat([shard.tensors[0] for shard in shards])  # type: ignore[attr-defined]
    together, training = (each.unique(dim=0) for each in (together, load()["training"][0]))
    assert torch.equal(together, training)


class Imagined:
    """Trainings whose accuracies are functions of the learning rate; counts what is asked for."""

    def __init__(self, best: float) -> None:
        self.best, self.asked = best, list[Trial]()

    def __call__(self, trial: Trial) -> Outcome:
        self.asked.append(trial)
        away = abs(math.log2(trial.lr / self.best))
        outcome = Outcome(trial)
        # What is best in the end on the validation part is worst at first, and on the test part.
        outcome.add(1, 100, validation=50 + away, test=50 + away)
        outcome.add(2, 200, validation=90 - away, test=60 + away + trial.seed)
        return outcome


@pytest.mark.parametrize("away", [-3, -1, 0, 2])
def test_the_rate_is_that_of_the_highest_final_accuracy_on_the_validation_part(away: int) -> None:
    cases = grid([1.0], ["Rank 1"], 64, 2)
    train_ = Imagined(best=cases[0].first_rate() * 2.0**away)
    tuning = Tuning(train_, seeds=3)
    for _ in range(2):  # the second time everything is there
        results = tuning.run(cases)
        for case in cases:
            assert [outcome.trial for outcome in results[case]] == [
                Trial(case, train_.best, seed) for seed in (1, 2, 3)
            ]
    assert len(set(train_.asked)) == len(train_.asked)
    tried = {trial.lr for trial in train_.asked if trial.seed == 1}
    assert {train_.best / 2, train_.best * 2} <= tried  # it lies between two that are worse
    assert len(tried) == 3 + abs(away)


def test_a_rate_that_is_given_is_not_tuned() -> None:
    train_ = Imagined(best=1.0)
    case = replace(RANK_1, given_lr=8.0)
    [outcomes] = Tuning(train_, seeds=2).run([case]).values()
    assert [outcome.trial for outcome in outcomes] == train_.asked
    assert train_.asked == [Trial(case, 8.0, seed) for seed in (1, 2)]


def test_options_choose_rows_and_the_rate() -> None:
    words = ["--noises", "2", "--compressions", "Rank 2", "--steps", "7", "--lr", "3"]
    [cases] = parts(parse_arguments(words)).values()
    assert cases == [
        Case(2.0, compression, has_feedback, 128, 7, given_lr=3.0)
        for compression, has_feedback in ((NONE, True), ("Rank 2", True), ("Rank 2", False))
    ]


def test_the_search_ends_and_takes_the_lowest_of_equal_rates() -> None:
    tuning = Tuning(Imagined(best=2.0**40))  # the more the better
    tuning.run([RANK_1])
    assert max(trial.lr for trial in tuning.outcomes) == 2**6 * RANK_1.first_rate() / 2
    level = Tuning(lambda trial: Outcome(trial, [1], [100], [50.0], [50.0]))
    [(outcome,)] = level.run([RANK_1]).values()
    assert outcome.trial.lr == min(trial.lr for trial in level.outcomes)


def imagined(case: Case, *tests: float) -> list[Outcome]:
    size = 8 if case.compression == NONE else 2
    return [
        Outcome(Trial(case, 0.5, seed), [1, 2], [size, 2 * size], [0.0, 0.0], [10.0, test])
        for seed, test in enumerate(tests, 1)
    ]


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    plain, none = (Case(noise, NONE, True, 64, 2) for noise in (0.0, 4.0))
    kept, lost = (Case(4.0, "Rank 1", has_feedback, 64, 2) for has_feedback in (True, False))
    results = {
        plain: imagined(plain, 90.0, 92.0), none: imagined(none, 80.0, 84.0),
        kept: imagined(kept, 81.0, 84.0), lost: imagined(lost, 60.0, 62.0),
    }  # fmt: skip
    assert gains(results[kept], results[none]) == [1.0, 0.0]
    assert markdown(accuracy_table("Some", results)).splitlines() == [
        "**Some**",
        "",
        "| σ | ε | Compression | Error feedback | Learning rate | Test accuracy (%) "
        "| Beside none | Sent per step |",
        "|---:|---:|---|---|---:|---:|---:|---:|",
        "| 0 | ∞ | None |  | 0.5 | 91.0 ± 1.4 |  | 8 bytes |",
        f"| 4 | {epsilon_after(none, 2):.2f} | None |  | 0.5 | 82.0 ± 2.8 |  | 8 bytes |",
        "|  |  | Rank 1 | yes | 0.5 | 82.5 ± 2.1 | +0.5 ± 0.7 | 2 bytes (4.0×) |",
        "|  |  | Rank 1 | no | 0.5 | 61.0 ± 1.4 | -21.0 ± 1.4 | 2 bytes (4.0×) |",
    ]
    plot_accuracy(tmp_path / "plot.png", results)
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.xdist_group("processes")
def test_the_script(tmp_path: Path) -> None:
    short = ["--steps", "1", "--noises", "4", "--processes", "1", "--output", str(tmp_path)]
    done = run("examples/private_training.py", *short)
    assert done.returncode == 0, done.stderr
    for words in ("128 records in a step, 1 steps", "Error feedback", "Rank 1", "Top-K 5 %"):
        assert words in done.stdout
    trials = [outcome["trial"] for outcome in results_of(tmp_path, "private_training")["runs"]]
    assert {trial["case"]["noise_multiplier"] for trial in trials} == {4.0}
    assert {trial["seed"] for trial in trials} == {1}


def test_the_whole_has_everything_of_the_first_table_and_what_may_help_compression() -> None:
    [(_, first)] = parts(parse_arguments([])).items()
    (_, whole), *others = parts(parse_arguments(["--full"])).items()
    assert set(first) < set(whole)
    assert {case.compression for case in whole} >= {NONE, "Rank 1", "Rank 2", "Rank 4"}
    found = {case for _, cases in others for case in cases}
    assert len({case.batch_size for case in found}) == 3
    assert len({case.steps for case in found}) == 2
    assert "Rank 1, drawn anew" in {case.compression for case in found}
    assert {case.given_lr for case in found} == {None, 4.0}
    for _, cases in others:  # each row has what it is compared with
        noises = {case.noise_multiplier for case in cases}
        assert noises == {c.noise_multiplier for c in cases if c.compression == NONE} == {1.0, 4.0}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_has_a_target_for_each() -> None:
    def commands(target: str) -> list[str]:
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return [line for line in done.stdout.splitlines() if "private_training" in line]

    [demo], [full] = commands("demo-privacy"), commands("demo-privacy-full")
    assert "--full" not in demo and "--full" in full
