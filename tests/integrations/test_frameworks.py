"""Lightning, Accelerate and transformers' Trainer, each with two processes over gloo.

What each of them trains is held, bit by bit, against an ordinary loop over the same batches.
"""

import csv
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from efsgd.wire.compare import checksum
from tests.integrations.frameworks import common
from tests.launcher import LIMIT, launch

# One process of pytest runs them all: they share launches, and several would crowd the cores.
# The first test of each framework waits for two launches.
pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.timeout(2 * LIMIT + 30)]

SCRIPTS = {
    "attached": "lightning",
    "unwrapped": "lightning",
    "accelerate": "accelerate",
    "trainer": "trainer",
}
PACKAGES = {"lightning": "lightning", "accelerate": "accelerate", "trainer": "transformers"}

Reports = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """What the workers of one framework report, and the folder with their checkpoints."""

    folder: Path
    trained: Reports
    resumed: Reports


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    runs: dict[str, Run] = {}

    def find(script: str) -> Run:
        if importlib.util.find_spec(PACKAGES[script]) is None:
            pytest.skip(f"{PACKAGES[script]} is not installed")
        if script not in runs:
            folder = tmp_path_factory.mktemp(script)
            program = str(Path(common.__file__).with_name(f"{script}_worker.py"))
            tasks = (launch(program, common.WORKERS, folder, t) for t in ("train", "resume"))
            runs[script] = Run(folder, *tasks)
        return runs[script]

    return find


@dataclass(frozen=True)
class Case:
    """One way to train with one framework, as each worker reports it."""

    name: str
    trained: Reports
    resumed: Reports
    plain: Reports


@pytest.fixture(params=SCRIPTS)
def case(request: pytest.FixtureRequest, run_of: Callable[[str], Run]) -> Case:
    name = request.param
    run = run_of(SCRIPTS[name])
    return Case(
        name,
        [report[name] for report in run.trained],
        [report[name] for report in run.resumed],
        run.trained[0]["plain"][name],
    )


def test_workers_have_equal_parameters_momenta_and_factors(case: Case) -> None:
    first, second = (report["trained"] for report in case.trained)
    momenta = "momentum_buffer" if case.name == "unwrapped" else "exp_avg"
    for kind in ("parameters", momenta, "q"):
        assert first[kind] == second[kind]


def test_what_is_trained_is_what_an_ordinary_loop_trains(case: Case) -> None:
    """Batches, accumulation, clipping, rates and averaged errors: to the bit."""
    for report, plain in zip(case.trained, case.plain, strict=True):
        for what in ("rates", "norms", "gradients", "trained"):
            assert report[what] == plain[what]


def test_resumed_in_new_processes_is_uninterrupted(case: Case) -> None:
    for resumed, trained in zip(case.resumed, case.trained, strict=True):
        steps = len(resumed["rates"])
        assert 0 < steps < len(trained["rates"])
        for what in ("rates", "norms", "gradients"):
            assert resumed[what] == trained[what][-steps:]
        assert resumed["trained"] == trained["trained"]


def test_little_is_sent(case: Case) -> None:
    for report in (*case.trained, *case.resumed):
        assert report["stats"]["collectives"] == 2
        assert report["stats"]["ratio"] > 6  # 8.9 for the digits, 6.6 for the language model


def test_gradients_are_averaged_unless_the_optimizer_is_our_own(case: Case) -> None:
    for report in case.trained:
        assert report["is_wrapped"] == (case.name != "unwrapped")
    pairs = zip(*(report["gradients"] for report in case.trained), strict=True)
    assert all((a == b) == (case.name != "unwrapped") for a, b in pairs)


def test_steps_rates_and_norms_are_those_asked_for(case: Case) -> None:
    for report in case.trained:
        assert len(report["rates"]) == report["stats"]["steps"] == 9
        if case.name != "trainer":  # which has a scheduler of its own
            assert report["rates"] == common.RATES  # one for each step, not each backward pass
        for norm in report["norms"]:
            # torch divides by the norm plus 1e-6, and the norm is computed anew.
            is_clipped = norm == pytest.approx(common.CLIP, rel=1e-4)
            assert is_clipped or norm < common.CLIP or case.name == "unwrapped"
        assert any(norm > 0.99 * common.CLIP for norm in report["norms"])


FIGURES = {"efsgd/ratio", "efsgd/bytes_sent", "efsgd/skipped_steps", "efsgd/relative_error"}


def test_lightning_s_logger_has_the_figures(run_of: Callable[[str], Run]) -> None:
    (folder,) = {report["attached"]["log_dir"] for report in run_of("lightning").trained}
    with Path(folder, "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["efsgd/ratio"]]
    assert rows[0].keys() > FIGURES
    assert [(row["step"], row["efsgd/steps"]) for row in rows] == [
        (str(step), f"{step}.0") for step in (3, 6, 9)
    ]


def test_accelerate_s_logger_has_the_figures(run_of: Callable[[str], Run]) -> None:
    logged, _ = (report["logged"] for report in run_of("accelerate").trained)  # by worker 0
    assert [each["efsgd/steps"] for each in logged] == [3, 6, 9]
    assert all(each.keys() > FIGURES for each in logged[1:])  # measured once somebody has asked


def test_the_trainer_logs_the_figures_whenever_it_logs_the_loss(
    run_of: Callable[[str], Run],
) -> None:
    for report in run_of("trainer").trained:
        logged = report["trainer"]["logged"]
        losses = [each["step"] for each in logged if "loss" in each]
        figures = [each for each in logged if each.keys() > FIGURES]
        assert losses == [each["step"] for each in figures] == [3, 6, 9]
        assert [each["efsgd/steps"] for each in figures] == losses


def test_lightning_s_loss_scaling_skips_a_step_on_all_workers(run_of: Callable[[str], Run]) -> None:
    """Worker 1 has overflowed; with the model wrapped and without, to the same end."""
    for way in zip(*(report["scaled"] for report in run_of("lightning").trained), strict=True):
        first, second = way
        for kind in ("parameters", "exp_avg", "q"):
            assert first["trained"][kind] == second["trained"][kind]
        for report in way:
            assert (report["stats"]["steps"], report["stats"]["skipped_steps"]) == (3, 1)
            assert report["scale"] == 2.0**15
            assert max(report["norms"]) < 1.001 * common.CLIP
    wrapped, unwrapped = run_of("lightning").trained[0]["scaled"]
    assert wrapped["trained"] == unwrapped["trained"]


def test_lightning_clips_averaged_gradients_with_the_model_wrapped_and_without(
    run_of: Callable[[str], Run],
) -> None:
    for report in run_of("lightning").trained:
        wrapped, unwrapped = report["clipped"]
        for what in ("norms", "gradients", "trained"):
            assert wrapped[what] == unwrapped[what]
        assert (wrapped["is_wrapped"], unwrapped["is_wrapped"]) == (True, False)
        assert wrapped["norms"][0] == pytest.approx(common.CLIP, rel=1e-4)


def test_accelerate_s_loss_scaling_skips_a_step_on_all_workers(
    run_of: Callable[[str], Run],
) -> None:
    for report in (report["overflow"] for report in run_of("accelerate").trained):
        assert report["is_untouched"] and report["skipped_steps"] == 1
        assert report["step_was_skipped"] and report["scale"] == 2.0**15


def test_lightning_ignores_ddp_comm_hook_without_cuda_and_the_optimizer_says_so(
    run_of: Callable[[str], Run],
) -> None:
    """Why the page on frameworks gives a callback; this fails once Lightning has changed it."""
    reports = [report["averaged_twice"] for report in run_of("lightning").trained]
    assert reports[0]["gradients"] == reports[1]["gradients"]
    assert all(report["warned"] for report in reports)


@pytest.mark.parametrize("script", ["accelerate", "trainer"])
def test_an_optimizer_of_our_own_is_given_local_gradients_and_saves_averaged_errors(
    script: str, run_of: Callable[[str], Run]
) -> None:
    first, second = (report["own"] for report in run_of(script).trained)
    assert all(a != b for a, b in zip(first["gradients"], second["gradients"], strict=True))
    for kind in ("parameters", "momentum_buffer", "q", "error"):
        assert first["trained"][kind] == second["trained"][kind]
    assert (first["stats"]["collectives"], first["stats"]["ratio"] > 6) == (2, True)


def test_trainer_saves_averaged_errors_after_the_best_evaluation(
    run_of: Callable[[str], Run],
) -> None:
    run = run_of("trainer")
    saved = torch.load(run.folder / "best" / "checkpoint-1" / "optimizer.pt", weights_only=True)
    errors = [state["error"] for state in saved["efsgd"]["state"].values() if "error" in state]
    assert any(bool(error.any()) for error in errors)
    for report in run.trained:
        assert report["best"]["trained"]["error"] == list(map(checksum, errors))


def test_who_trains_adapters_is_told_that_nothing_is_saved(run_of: Callable[[str], Run]) -> None:
    first, second = (report["adapters"] for report in run_of("trainer").trained)
    (text,) = [each for each in first if each.startswith("Compression saves little")]
    assert "matrices too thin to be compressed, as LoRA's are (2, the largest [61, 2])" in text
    assert not any("Compression saves little" in each for each in second)


REFUSED = {
    "lightning": ["ValueError: SeveralOptimizers has 4 optimizers, and GradientCompression is for"],
    "accelerate": [
        "ValueError: Invalid objects: 1 models and 0 optimizers. Must be one of each",
        "ValueError: Invalid objects: 2 models and 1 optimizers. Must be one of each",
        "NotImplementedError: Accelerate is set up for FSDP",
    ],
    "trainer": ["NotImplementedError: The Trainer is set up for FSDP or DeepSpeed"],
}


@pytest.mark.parametrize("script", REFUSED)
def test_what_cannot_be_compressed_is_refused(script: str, run_of: Callable[[str], Run]) -> None:
    for report in run_of(script).trained:
        for words, expected in zip(report["refused"], REFUSED[script], strict=True):
            assert words.startswith(expected)
