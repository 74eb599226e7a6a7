"""Lightning, Accelerate and transformers' Trainer, each with two processes over gloo.

What each of them trains is held, bit by bit, against an ordinary loop over the same batches.
"""

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
    "unwrapped": "lightning",
    "wrapped": "lightning",
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
    for kind in ("parameters", "momentum_buffer", "momentum_started", "q"):
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


def test_gradients_are_local_and_little_is_sent(case: Case) -> None:
    for report in (*case.trained, *case.resumed):
        assert report["stats"]["collectives"] == 2
        assert report["stats"]["ratio"] > 6  # 8.9 for the digits, 6.6 for the language model
        assert report["is_wrapped"] == (case.name != "unwrapped")
    first, second = (report["gradients"] for report in case.trained)
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_steps_rates_and_norms_are_those_asked_for(case: Case) -> None:
    for report in case.trained:
        assert report["rates"] == common.RATES  # one for each step, not each backward pass
        assert report["stats"]["steps"] == len(common.RATES)
        is_clipped = case.name != "unwrapped"
        for norm in report["norms"]:
            # torch divides by the norm plus 1e-6, and the norm is computed anew.
            assert (norm == pytest.approx(common.CLIP, rel=1e-4)) == is_clipped


def test_the_average_is_clipped_in_full_and_in_mixed_precision(
    run_of: Callable[[str], Run],
) -> None:
    """By what, the ordinary loop has shown; here, that the norms ask for it."""
    for report in run_of("lightning").trained:
        for name in ("unwrapped", "wrapped"):
            assert report[name]["stats"]["grad_norm"] > 0.2


def test_lightning_ignores_ddp_comm_hook_without_cuda_and_the_optimizer_says_so(
    run_of: Callable[[str], Run],
) -> None:
    """Why the page on frameworks gives a callback; this fails once Lightning has changed it."""
    reports = [report["averaged_twice"] for report in run_of("lightning").trained]
    assert reports[0]["gradients"] == reports[1]["gradients"]
    assert all(report["warned"] for report in reports)


def test_lightning_s_loss_scaling_skips_a_step_on_all_workers(run_of: Callable[[str], Run]) -> None:
    first, second = (report["scaled"] for report in run_of("lightning").trained)
    for kind in ("parameters", "momentum_buffer", "q"):
        assert first["trained"][kind] == second["trained"][kind]
    for report in (first, second):
        assert (report["stats"]["steps"], report["stats"]["skipped_steps"]) == (3, 1)
    assert (first["scale"], second["scale"]) == (2.0**16, 2.0**15)  # worker 1 has overflowed


def test_lightning_does_not_clip_under_mixed_precision(run_of: Callable[[str], Run]) -> None:
    for report in run_of("lightning").trained:
        for words in report["clipped"]:
            assert "PowerSGDOptimizer, does not allow for gradient clipping" in words


def test_accelerate_s_loss_scaling_skips_a_step_on_all_workers(
    run_of: Callable[[str], Run],
) -> None:
    for report in (report["overflow"] for report in run_of("accelerate").trained):
        assert report["is_untouched"] and report["skipped_steps"] == 1
        assert not report["step_was_skipped"]  # as the page on frameworks says


def test_trainer_saves_averaged_errors_after_the_best_evaluation(
    run_of: Callable[[str], Run],
) -> None:
    run = run_of("trainer")
    saved = torch.load(run.folder / "best" / "checkpoint-1" / "optimizer.pt", weights_only=True)
    errors = [state["error"] for state in saved["state"].values() if "error" in state]
    assert any(bool(error.any()) for error in errors)
    for report in run.trained:
        assert report["best"]["trained"]["error"] == list(map(checksum, errors))
