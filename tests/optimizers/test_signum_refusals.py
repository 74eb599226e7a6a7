"""Steps of Signum that are refused: nothing changes, and on no worker."""

import math

import pytest
import torch

from efsgd import NonFiniteGradientError
from efsgd.errors import CollectiveError, WorkerMismatchError
from efsgd.testing import step_together
from tests.algorithms.test_signum import a_run, momenta_of, workers_of
from tests.simulation import bits, parameters_of, set_gradients, snapshot, step_with


@pytest.mark.parametrize("policy", ["skip", "raise"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_anywhere(policy: str, bad: float) -> None:
    (workers, scenario), (twins, _) = a_run(nonfinite=policy), a_run(nonfinite=policy)
    for step in range(2):
        step_with(workers, scenario.gradients(step))
        step_with(twins, scenario.gradients(step))
    before, given = bits(snapshot(workers)), scenario.gradients(2)
    given[1][3] = torch.full((4, 3, 2), bad)
    if policy == "raise":
        with pytest.raises(NonFiniteGradientError, match="worker 1 the gradient of parameter 3"):
            step_with(workers, given)
    else:
        step_with(workers, given)
        assert all(o.communication_stats()["skipped_steps"] == 1 for o in workers)
    assert bits(snapshot(workers)) == before
    step_with(workers, scenario.gradients(3))
    step_with(twins, scenario.gradients(3))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


@pytest.mark.parametrize("fail_at", [0, 1])
def test_a_failed_collective_changes_nothing(fail_at: int) -> None:
    (workers, scenario), (twins, _) = a_run(), a_run()
    step_with(workers, scenario.gradients(0))
    step_with(twins, scenario.gradients(0))
    before = bits(snapshot(workers))
    with pytest.raises(CollectiveError, match="injected"):
        step_with(workers, scenario.gradients(1), fail_at=fail_at)
    assert bits(snapshot(workers)) == before
    step_with(workers, scenario.gradients(2))
    step_with(twins, scenario.gradients(2))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


def test_a_scaler_s_overflow_is_skipped_and_its_scale_does_not_matter() -> None:
    (plain,), scenario = a_run(1)
    (scaled,), _ = a_run(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step in range(3):
        for optimizer in (plain, scaled):
            set_gradients([optimizer], scenario.gradients(step))
        scaler.scale(torch.tensor(0.0))
        for p in parameters_of(scaled):
            p.grad.mul_(scaler.get_scale())
        if step == 1:
            before = bits(snapshot([scaled]))
            parameters_of(scaled)[0].grad[3, 3] = math.inf
        scaler.step(scaled)
        scaler.update()
        if step == 1:
            assert bits(snapshot([scaled])) == before
        else:
            plain.step()
    assert scaler.get_scale() == 2.0**15
    # It was told, and took part: with several workers, others may wait for it.
    assert scaled.communication_stats()["skipped_steps"] == 1
    assert bits(snapshot([plain])) == bits(snapshot([scaled]))


def test_sparse_gradients_are_refused_and_dense_ones_go_on() -> None:
    parameters = [torch.ones(6, 3), torch.ones(4)]
    for world_size in (1, 2):
        workers = workers_of(parameters, world_size)
        for number in (0, 1):  # in the first step, and in a later one
            before = bits(snapshot(workers))
            gradients = [[torch.ones(6, 3), torch.ones(4)] for _ in workers]
            gradients[0][0] = torch.ones(6, 3).to_sparse()
            set_gradients(workers, gradients)
            with pytest.raises(NotImplementedError, match="does not take sparse gradients"):
                step_together(workers)
            assert bits(snapshot(workers)) == before
            step_with(workers, [[torch.ones(6, 3), torch.ones(4)]] * world_size)
            assert [int(o.param_groups[0]["step"]) for o in workers] == [number + 1] * world_size


def test_check_every_finds_drifted_parameters_and_lets_momenta_be() -> None:
    workers, scenario = a_run(check_every=2)
    for step in range(3):  # with local momenta that differ, of course
        step_with(workers, scenario.gradients(step))
    assert bits(momenta_of(workers[0])) != bits(momenta_of(workers[1]))
    step_with(workers, scenario.gradients(3))
    with torch.no_grad():
        parameters_of(workers[1])[1][0] += 1.0
    with pytest.raises(WorkerMismatchError, match="parameter 1 differs between workers"):
        step_with(workers, scenario.gradients(0))
