"""Autocast, loss scaling and half precision: what is kept in which dtype, and who skips when.

What the workers do is in `mixed_precision_worker.py`.
"""

import re
from typing import Any

import pytest
import torch

from efsgd.testing import step_together
from tests.integrations.around_ddp_training import (
    batch,
    fingerprint,
    loss_of,
    make_model,
    make_optimizer,
)
from tests.launcher import ROOT, launch
from tests.optimizers import mixed_precision_worker as script
from tests.simulation import difference, errors_of, make_workers, reference_for, step_with
from tests.strategies import Scenario

pytestmark = pytest.mark.xdist_group("processes")

WORLD_SIZE = 2
Reports = list[dict[str, Any]]
KEPT_IN_FLOAT32 = ["error torch.float32", "q torch.float32"]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What each worker reports of all tasks."""
    return launch(script.__file__, WORLD_SIZE, tmp_path_factory.mktemp("mixed_precision"))


def replicated(trained: dict[str, Any]) -> dict[str, Any]:
    """All but the errors."""
    return {name: value for name, value in trained.items() if name != "error"}


# ---- autocast -----------------------------------------------------------------------------------


def test_autocast_trains_as_in_lockstep_and_under_ddp(workers: Reports) -> None:
    models = [make_model() for _ in workers]
    optimizers = [make_optimizer(model) for model in models]
    for step in range(script.STEPS):
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            script.autocast_loss(model, batch(worker, step)).backward()
        step_together(optimizers)
    exact = [loss_of(model, batch(0, 0)) for model in models]
    assert script.autocast_loss(models[0], batch(0, 0)) != exact[0]  # it does compute in bfloat16
    for report, optimizer in zip(workers, optimizers, strict=True):
        assert report["autocast"]["plain"] == fingerprint(optimizer)
        assert report["autocast"]["noop_hook"] == report["autocast"]["plain"]
        assert report["autocast"]["dtypes"] == [
            "error torch.float32",
            "gradient torch.float32",
            "momentum_buffer torch.float32",
            "momentum_started torch.bool",
            "parameter torch.float32",
            "q torch.float32",
        ]


# ---- loss scaling -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["ready", "unscaled"])
def test_an_overflow_on_one_worker_is_skipped_by_all(workers: Reports, stage: str) -> None:
    for worker in workers:
        report = worker["scaler"][stage]
        assert report["untouched"]  # parameters, errors, momenta, Q and the count of steps
        assert report["skipped"] == [0, 0, 1, 1, 1, 1]
        assert report["step"] == script.STEPS - 1
        assert report["collectives"] == 2
        # To the bit what it would have been without that step: scales are powers of two.
        assert report["trained"] == worker["scaler"][f"{stage}, expected"]
        assert replicated(report["trained"]) == replicated(workers[0]["scaler"][stage]["trained"])


def expected_scales(start: float, overflow: int | None) -> list[float]:
    """Of torch.amp.GradScaler, which halves after an overflow and doubles after good steps."""
    scales, good = [start], 0
    for step in range(script.STEPS):
        good = 0 if step == overflow else good + 1
        factor = 0.5 if step == overflow else 1.0
        if good == script.GROWTH_INTERVAL:
            factor, good = 2.0, 0
        scales.append(scales[-1] * factor)
    return scales


def test_scales_part_and_that_does_no_harm(workers: Reports) -> None:
    for stage in ("ready", "unscaled"):
        for number, worker in enumerate(workers):
            overflow = script.OVERFLOW if number == script.OVERFLOWS_ON else None
            assert worker["scaler"][stage]["scales"] == expected_scales(script.SCALE, overflow)
    first, second = (worker["scaler"]["ready"]["scales"] for worker in workers)
    assert first[-1] != second[-1]
    for number, worker in enumerate(workers):
        report = worker["scaler"]["apart from the start"]
        assert report["scales"][0] == script.SCALE / 8**number
        assert report["trained"] == worker["scaler"]["ready, expected"]


def test_a_worker_without_gradients_tells_its_scaler_the_scale(workers: Reports) -> None:
    first, second = (worker["scaler"]["without gradients"] for worker in workers)
    assert first["trained"]["parameters"] == second["trained"]["parameters"]
    assert first["trained"]["parameters"] != first["start"]["parameters"]
    assert second["refused"] == ["AssertionError"] * 2


def test_a_float16_model_with_a_scaler() -> None:
    # `scaler.unscale_` refuses float16 gradients; `step` unscales them itself, in float32.
    model = make_model().half()
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_of(model, batch(0, 0))
        losses.append(loss.item())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.communication_stats()["steps"] == 40
    scaler.scale(loss_of(model, batch(0, 0))).backward()
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)


# ---- half precision throughout ------------------------------------------------------------------


def test_a_bfloat16_model_keeps_errors_and_factors_in_float32(workers: Reports) -> None:
    for worker in workers:
        report = worker["pure_bfloat16"]
        assert report["dtypes"] == [
            "error torch.float32",
            "gradient torch.bfloat16",
            "momentum_buffer torch.bfloat16",
            "momentum_started torch.bool",
            "parameter torch.bfloat16",
            "q torch.float32",
        ]
        others = workers[0]["pure_bfloat16"]
        assert replicated(report["trained"]) == replicated(others["trained"])
        assert report["losses"][-1] < 0.5 * report["losses"][0]
        # Rank 2 of 24x20 and 12x24, 36 biases, 4 words for parameters and 2 for workers: float32.
        floats = 2 * (24 + 20) + 2 * (12 + 24) + 36 + 4 + 2
        assert report["stats"]["bytes_sent"] == 4 * floats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_errors_of_half_precision_gradients_are_exact_to_float32(dtype: torch.dtype) -> None:
    options = {"lr": 0.0, "rank": 2}
    scenario = Scenario([(12, 10), (10,)], WORLD_SIZE, {"rank": 2}, 9, 4)
    start = [parameter.to(dtype) for parameter in scenario.parameters()]
    optimizers = make_workers(start, WORLD_SIZE, **options)
    reference = reference_for(scenario)
    for step in range(8):
        gradients = [[g.to(dtype) for g in own] for own in scenario.gradients(step)]
        step_with(optimizers, gradients)
        reference.step(gradients)
    for worker, optimizer in enumerate(optimizers):
        for own, expected in zip(errors_of(optimizer), reference.errors[worker], strict=True):
            # float32's 6e-8 in sums of 12 and 8 steps of error feedback; bfloat16 has 4e-3.
            assert difference(own, expected) < 1e-5


def test_what_is_sent_uncompressed_stays_exact_where_the_hook_of_torch_drifts(
    workers: Reports,
) -> None:
    for worker in workers:
        report = worker["drift"]
        assert len(report["own"]) == 400
        assert all(own == report["rounded mean"] for own in report["own"])
        assert report["lines"] == workers[0]["drift"]["lines"]
    page = (ROOT / "docs" / "mixed-precision.md").read_text()
    assert "\n".join(workers[0]["drift"]["lines"]) in page


def test_the_table_of_the_page_says_that_the_hook_drifts(workers: Reports) -> None:
    rows = [re.findall(r"[\d.]+", line) for line in workers[0]["drift"]["lines"][2:]]
    of_hook = {int(row[0]): float(row[1]) for row in rows}
    assert of_hook[50] > 4 and of_hook[400] > 30  # percent
    assert list(of_hook.values()) == sorted(of_hook.values())


def test_a_layer_learns_after_zeros_where_the_hook_of_torch_does_not(workers: Reports) -> None:
    for worker in workers:
        lines = worker["zeros"]["lines"]
        assert "\n".join(lines) + "\n" == (ROOT / "docs" / "hook_zeros.txt").read_text()
        low_ranks = [line.split(" | ") for line in lines[2:4]]
        assert [row[1:3] for row in low_ranks] == [["nan", "0.00"]] * 2
        assert all(float(row[3].strip(" |")) > 0.1 for row in low_ranks)
