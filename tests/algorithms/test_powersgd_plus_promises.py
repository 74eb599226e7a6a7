"""PowerSGD+ keeps every promise, through refreshes."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efsgd import CollectiveError, ErrorFeedbackSGD, NonFiniteGradientError, WorkerMismatchError
from efsgd.compressors.powersgd_plus import PowerSGDPlus
from tests.algorithms.powersgd_plus_runs import LR, PLAIN, VARIANTS, a_run, make_workers, workers_of
from tests.promises.test_nothing_is_lost import Balance
from tests.simulation import (
    bits,
    difference,
    parameters_of,
    replicated,
    snapshot,
    step_with,
)
from tests.strategies import (
    KINDS,
    Scenario,
    gaussian,
    make_gradient,
    scenarios,
    seeds,
)


@settings(max_examples=40)
@given(scenarios(max_steps=5, **PLAIN), VARIANTS)
def test_nothing_is_lost_and_workers_stay_equal_through_refreshes(
    scenario: Scenario, variant: dict[str, Any]
) -> None:
    workers = workers_of(scenario, **variant)
    balance = Balance(workers)
    for step in range(scenario.steps):
        balance.step(workers, scenario.gradients(step))
        assert all(replicated(other) == replicated(workers[0]) for other in workers[1:])


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("refresh_update", ["low_rank", "exact"])
def test_zero_matrices_survive_refreshes_and_learn_again(svd: str, refresh_update: str) -> None:
    compressor = PowerSGDPlus(
        rank=2, refresh_every=3, svd=svd, refresh_update=refresh_update, min_compression_rate=0.0
    )
    target = gaussian((2, 9, 8), 5).float()
    workers = make_workers([torch.zeros(9, 8), torch.zeros(9, 8)], 2, compressor, lr=0.2)
    for step in range(64):
        now = [p.detach() - t for p, t in zip(parameters_of(workers[0]), target, strict=True)]
        if step < 4:
            now[0] = torch.zeros(9, 8)
        step_with(workers, [now, now])
        if step < 4:
            assert not parameters_of(workers[0])[0].any()
            assert workers[0].state[parameters_of(workers[0])[0]]["q"].any(dim=0).all()
    for p, t in zip(parameters_of(workers[0]), target, strict=True):
        assert (p - t).norm() < 0.2 * t.norm()  # 60 steps, a quarter of the rank seen in each


@settings(max_examples=25)
@given(st.sampled_from(KINDS), VARIANTS, st.integers(-100, 100), seeds())
def test_a_power_of_two_scales_everything_to_the_bit(
    kind: str, variant: dict[str, Any], exponent: int, seed: int
) -> None:
    gradients = [make_gradient((9, 8), kind, w, seed).float() for w in range(2)]
    compressor = PowerSGDPlus(rank=2, **variant)
    results = []
    for scale in (1.0, 2.0**exponent):
        workers = make_workers([torch.zeros(9, 8)], 2, compressor)
        for _ in range(3):
            step_with(workers, [[g * scale] for g in gradients])
        results.append(parameters_of(workers[0])[0].detach() / scale)
    assert results[0].isfinite().all()
    # At the small end what should be zero may end in a subnormal number, with fewer digits.
    assert difference(*results) <= (2.0**-40 if exponent < -60 else 0.0)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_gradients_are_finite(scale: float, svd: str) -> None:
    workers = make_workers(
        [torch.zeros(9, 8)], 2, PowerSGDPlus(rank=2, refresh_every=2, svd=svd), lr=1e-3
    )
    for step in range(4):
        given = [[scale * gaussian((9, 8), step, w).float()] for w in range(2)]
        step_with(workers, given)
    assert parameters_of(workers[0])[0].isfinite().all()
    assert parameters_of(workers[0])[0].any()


@pytest.mark.parametrize("refresh_update", ["low_rank", "exact"])
@pytest.mark.parametrize("fail_at", [0, 1])
def test_a_refresh_that_fails_changes_nothing_and_is_taken_again(
    refresh_update: str, fail_at: int
) -> None:
    workers, scenario = a_run(refresh_update=refresh_update)
    twins, _ = a_run(refresh_update=refresh_update)
    for step in range(4):
        for optimizers in (workers, twins):
            step_with(optimizers, scenario.gradients(step))
    before = bits(snapshot(workers))
    if refresh_update == "low_rank" or fail_at == 0:
        with pytest.raises(CollectiveError):
            step_with(workers, scenario.gradients(4), fail_at=fail_at)
        assert bits(snapshot(workers)) == before
        step_with(workers, scenario.gradients(4))
        step_with(twins, scenario.gradients(4))
        assert bits(snapshot(workers)) == bits(snapshot(twins))
    else:  # it has one collective only
        step_with(workers, scenario.gradients(4), fail_at=fail_at)


@pytest.mark.parametrize("refresh_update", ["low_rank", "exact"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("index", range(4))
def test_a_bad_gradient_at_a_refresh_changes_nothing_anywhere(
    value: float, index: int, refresh_update: str
) -> None:
    workers, scenario = a_run(refresh_update=refresh_update)
    twins, _ = a_run(refresh_update=refresh_update)
    for step in range(2):
        step_with(workers, scenario.gradients(step))
        step_with(twins, scenario.gradients(step))
    before, gradients = bits(snapshot(workers)), scenario.gradients(2)
    gradients[1][index].view(-1)[-1] = value
    with pytest.raises(NonFiniteGradientError, match=f"worker 1 the gradient of parameter {index}"):
        step_with(workers, gradients)
    assert bits(snapshot(workers)) == before
    for step in (2, 3):
        step_with(workers, scenario.gradients(step))
        step_with(twins, scenario.gradients(step))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_a_mean_that_overflows_at_a_refresh_is_noticed_by_all(svd: str) -> None:
    workers = make_workers([torch.zeros(9, 8)], 2, PowerSGDPlus(rank=1, svd=svd))
    with pytest.raises(NonFiniteGradientError, match="their mean overflows"):
        step_with(workers, [[torch.full((9, 8), 3e38)]] * 2)
    assert not parameters_of(workers[0])[0].any()


@pytest.mark.parametrize("steps", [4, 5])
@pytest.mark.parametrize("refresh_update", ["low_rank", "exact"])
def test_what_one_worker_changes_is_an_error_on_all_at_a_refresh_or_not(
    steps: int, refresh_update: str
) -> None:
    options = {"refresh_every": 3, "start_compressing_at": 1, "refresh_update": refresh_update}
    workers, scenario = a_run(**options)
    for step in range(steps):
        step_with(workers, scenario.gradients(step))
    workers[1].param_groups[0]["rank"] = 1
    with pytest.raises(WorkerMismatchError, match="worker 1 has changed"):
        step_with(workers, scenario.gradients(steps))


def test_a_parameter_without_gradient_keeps_its_state_at_a_refresh() -> None:
    workers, scenario = a_run()
    for step in range(2):
        step_with(workers, scenario.gradients(step))
    p = parameters_of(workers[0])[0]
    before = bits([p, dict(workers[0].state[p])])
    step_with(workers, [[None, *own[1:]] for own in scenario.gradients(2)])
    assert bits([p, dict(workers[0].state[p])]) == before


@pytest.mark.parametrize("refresh_update", ["low_rank", "exact"])
def test_the_norm_of_an_update_is_told(refresh_update: str) -> None:
    workers, scenario = a_run(refresh_update=refresh_update, max_grad_norm=math.inf)
    for step in range(3):
        before = [p.detach().clone() for p in parameters_of(workers[0])]
        step_with(workers, scenario.gradients(step))
        moved = [a - b for a, b in zip(before, parameters_of(workers[0]), strict=True)]
        norm = math.sqrt(sum(float(m.detach().square().sum()) for m in moved)) / LR
        assert workers[0].communication_stats()["grad_norm"] == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize(
    ("setting", "value", "text"),
    [
        ("refresh_every", 0, r"Invalid refresh_every: 0\. Must be a number of steps, at least 1"),
        ("refresh_every", 2.0, r"Invalid refresh_every: 2\.0"),
        ("refresh_every", True, "Invalid refresh_every: True"),
        ("svd", "fast", r"Invalid svd: 'fast'\. Must be 'exact' or 'randomized'"),
        ("refresh_update", None, "Invalid refresh_update: None. Must be 'low_rank' or 'exact'"),
        ("rank", 0, "Invalid rank: 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: str, value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PowerSGDPlus(**{setting: value})
    [worker] = make_workers([torch.zeros(9, 8)], 1, PowerSGDPlus())
    worker.param_groups[0][setting] = value
    with pytest.raises(ValueError, match=text):
        step_with([worker], [[torch.ones(9, 8)]])


def test_alternating_is_not_for_it() -> None:
    with pytest.raises(TypeError):
        PowerSGDPlus(alternating=True)
    [worker] = make_workers([torch.zeros(9, 8)], 1, PowerSGDPlus())
    worker.param_groups[0]["alternating"] = True
    with pytest.raises(ValueError, match="Invalid alternating: True"):
        step_with([worker], [[torch.ones(9, 8)]])


def test_groups_share_what_decides_the_schedule() -> None:
    for setting, value in {"refresh_every": 7, "svd": "randomized"}.items():
        groups: list[dict[str, Any]] = [{"params": [torch.zeros(9, 8)]} for _ in range(2)]
        groups[1][setting] = value
        with pytest.raises(ValueError, match=f"Invalid {setting}"):
            ErrorFeedbackSGD(groups, compressor=PowerSGDPlus())
