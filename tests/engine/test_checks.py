"""What drifted between workers is found by the checks of `check_every`."""

from typing import Any

import pytest
import torch

from efsgd import PowerSGDOptimizer, WorkerMismatchError
from efsgd.testing import step_together
from tests.simulation import a_run, bits, parameters_of, set_gradients, snapshot, step_with


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("parameter", "parameter 2 differs"),
        ("momentum_buffer", "momentum_buffer of parameter 2 differs"),
        ("q", "q of parameter 2 differs"),
        ("lr", r"worker 0: lr=0\.05 .* worker 1: lr=0\.06"),
        ("nonfinite", "worker 1: nonfinite=skip"),
    ],
)
def test_what_drifted_is_found_when_the_check_is_due(key: str, words: str) -> None:
    workers, scenario = a_run(2, check_every=3)
    for step in range(3):
        step_with(workers, scenario.gradients(step))
    last, parameter = workers[1], parameters_of(workers[1])[2]
    if key == "parameter":
        parameter.data[0, 0] += 1e-12
    elif key in last.state[parameter]:
        last.state[parameter][key][0, 0] += 1e-12
    else:
        last.param_groups[0][key] = {"lr": 0.06, "nonfinite": "skip"}[key]
    set_gradients(workers, scenario.gradients(3))
    before = bits(snapshot(workers))
    with pytest.raises(WorkerMismatchError, match=words):
        step_together(workers)
    assert bits(snapshot(workers)) == before


def test_what_drifted_is_not_found_before_that() -> None:
    workers, scenario = a_run(2, check_every=3)
    step_with(workers, scenario.gradients(0))
    parameters_of(workers[1])[2].data[0, 0] += 1e-12
    for step in (1, 2):
        assert len(step_with(workers, scenario.gradients(step))) == 2
    with pytest.raises(WorkerMismatchError, match="parameter 2 differs"):
        step_with(workers, scenario.gradients(3))


def test_a_check_is_one_small_collective_before_every_so_manieth_step() -> None:
    workers, scenario = a_run(2, check_every=2)
    sizes = []
    for step in range(5):
        trace = step_with(workers, scenario.gradients(step % 4))
        sizes.append([traced.nbytes for traced in trace if traced.kind == "AllGather"])
    assert sizes[1:] == [[], [24], [], [24]]
    assert len(sizes[0]) == 3


@pytest.mark.parametrize("later", [2, 3])
def test_check_every_may_not_change_on_one_worker(later: int) -> None:
    workers, scenario = a_run(2, check_every=2)
    for step in range(later):
        step_with(workers, scenario.gradients(step))
    workers[1].param_groups[0]["check_every"] = 3
    with pytest.raises(WorkerMismatchError, match="worker 1"):
        step_with(workers, scenario.gradients(later))


@pytest.mark.parametrize("value", [-1, 1.5, True, None, "2"])
def test_intervals_that_make_no_sense_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid check_every: .* Must be a number of steps"):
        PowerSGDOptimizer([torch.zeros(3, requires_grad=True)], check_every=value)
