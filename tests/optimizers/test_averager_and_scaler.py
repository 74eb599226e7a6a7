"""GradientAverager under torch.amp.GradScaler."""

import copy
import math

import pytest
import torch

from efsgd import GradientAverager
from efsgd.testing import lockstep
from tests.optimizers.test_averager import averagers, gradients, step
from tests.simulation import bits, parameters_of, set_gradients


@pytest.mark.parametrize("overflows", [False, True])
def test_a_scaler_sees_the_same_on_all_workers_and_errors_are_unscaled(overflows: bool) -> None:
    plain, scaled = averagers(2), averagers(2)
    step(plain, 1)
    set_gradients(scaled, [gradients(1, 0), gradients(1, 1)])
    scales = [2.0**10, 2.0**12]  # they may differ
    for worker, scale in zip(scaled, scales, strict=True):
        for parameter in parameters_of(worker):
            if parameter.grad is not None:
                parameter.grad *= scale
    if overflows:
        parameters_of(scaled[0])[2].grad[0] = math.inf
    before = bits([worker.state_dict()["state"] for worker in scaled])
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for scale in scales]
    sgds = [torch.optim.SGD(parameters_of(worker), lr=0.1) for worker in scaled]
    for worker, scaler in zip(scaled, scalers, strict=True):
        scaler.scale(torch.zeros(()))  # as the loss was: it makes its scale then
        worker._scale = scaler.get_scale()  # what average_(scaler) does around its exchange
    results = lockstep([worker.exchange(2, index) for index, worker in enumerate(scaled)]).results
    assert results == [not overflows] * 2
    if not overflows:
        for mine, other in zip(scaled, plain, strict=True):
            assert bits([mine.state[p] for p in parameters_of(mine)]) == bits(
                [other.state[p] for p in parameters_of(other)]
            )
    else:
        assert bits([worker.state_dict()["state"] for worker in scaled]) == before
    for sgd, scaler in zip(sgds, scalers, strict=True):
        values = copy.deepcopy(sgd.param_groups[0]["params"])
        scaler.unscale_(sgd)
        scaler.step(sgd)
        scaler.update()
        stayed = bits(values) == bits(sgd.param_groups[0]["params"])
        assert stayed == overflows
    assert [scaler.get_scale() for scaler in scalers] == [s / (1 + overflows) for s in scales]


def test_average_takes_the_scaler_s_scale() -> None:
    parameter = torch.zeros(3, requires_grad=True)
    averager = GradientAverager([parameter])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(parameter.sum()).backward()
    assert averager.average_(scaler)
    assert parameter.grad.tolist() == [8.0] * 3
    parameter.grad[0] = math.nan
    assert not averager.average_(scaler)
    assert parameter.grad.tolist() == [math.inf] * 3


def test_an_overflow_is_told_to_a_sparse_gradient_and_once_to_each_parameter() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    table, vector = torch.zeros(6, 5, requires_grad=True), torch.zeros(2, requires_grad=True)
    scaler.scale(table.sum())
    table.grad = torch.ones(6, 5).to_sparse()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        averager = GradientAverager([{"params": [table]}, {"params": [vector, vector]}])
    vector.grad = torch.full((2,), 8.0)
    assert averager.average_(scaler)
    assert vector.grad.tolist() == [8.0, 8.0]
    table.grad = torch.ones(6, 5).to_sparse() * math.inf
    assert not averager.average_(scaler)
    assert bool(table.grad.isinf().all())


def test_averaging_after_unscale_is_refused() -> None:
    parameter = torch.zeros(3, requires_grad=True)
    averager, sgd = GradientAverager([parameter]), torch.optim.SGD([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(2):
        parameter.grad = None
        scaler.scale(parameter.sum()).backward()
        assert averager.average_(scaler)
        scaler.unscale_(sgd)
        with pytest.raises(RuntimeError, match=r"Call average_\(scaler\) first"):
            averager.average_(scaler)
        assert parameter.grad.tolist() == [1.0] * 3
        scaler.step(sgd)
        scaler.update()


def test_two_averagers_share_a_scaler_with_unscale_in_between() -> None:
    parameters = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    averagers = [GradientAverager([parameter]) for parameter in parameters]
    sgds = [torch.optim.SGD([parameter], lr=1.0) for parameter in parameters]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    for iteration in range(1, 3):
        for parameter, averager, sgd in zip(parameters, averagers, sgds, strict=True):
            sgd.zero_grad()
            scaler.scale(parameter.sum()).backward()
            assert averager.average_(scaler)
            scaler.unscale_(sgd)
            assert parameter.grad is not None
            assert parameter.grad.tolist() == [1.0] * 3
        for sgd in sgds:
            scaler.step(sgd)
        scaler.update()
        assert scaler.get_scale() == 8.0 * 2**iteration
        assert [p.tolist() for p in parameters] == [[-float(iteration)] * 3] * 2
    # In a new iteration misuse by the first averager is found again.
    scaler.scale(parameters[0].sum()).backward()
    scaler.unscale_(sgds[0])
    with pytest.raises(RuntimeError, match="Call average_"):
        averagers[0].average_(scaler)
