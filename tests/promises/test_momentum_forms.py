"""`momentum_form="sgd"` is torch.optim.SGD; `"paper"` is what it says it is."""

import pytest
import torch

from efsgd import PowerSGDOptimizer
from tests.simulation import make_workers, parameters_of, step_with
from tests.strategies import Scenario

SHAPES = [(12, 10), (10,), (4, 3, 3, 3), (), (0, 3), (12, 10)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_uncompressed_workers_are_sgd_on_the_mean_gradient(world_size: int) -> None:
    scenario = Scenario(SHAPES, world_size, {}, 4, 3)
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    workers = make_workers(
        scenario.parameters(), world_size, momentum_form="sgd", start_compressing_at=99, **options
    )
    theirs = [p.requires_grad_() for p in scenario.parameters()]
    expected = torch.optim.SGD(theirs, **options)
    for step in range(4):
        gradients = scenario.gradients(step)
        step_with(workers, gradients)
        for index, parameter in enumerate(theirs):
            total = torch.zeros_like(parameter)
            for own in gradients:
                total += own[index]
            parameter.grad = total / world_size  # the same sum, so the same bits
        expected.step()
    for mine, other in zip(parameters_of(workers[0]), theirs, strict=True):
        assert torch.equal(mine, other)


def test_a_constant_gradient_in_both_forms() -> None:
    # The steady state is lr (1 + 1/(1-λ)) against lr/(1-λ): 11 and 10 at λ = 0.9.
    moved = {}
    for form in ("paper", "sgd"):
        x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = PowerSGDOptimizer([x], lr=1.0, momentum=0.9, momentum_form=form)
        for _ in range(1000):
            x.grad = torch.ones_like(x)
            before = x.item()
            optimizer.step()
        moved[form] = before - x.item()
    assert moved == {"paper": pytest.approx(11, rel=1e-9), "sgd": pytest.approx(10, rel=1e-9)}


def test_without_momentum_the_paper_steps_twice_as_far() -> None:
    x = torch.zeros(1, requires_grad=True)
    optimizer = PowerSGDOptimizer([x], lr=0.5)
    x.grad = torch.ones(1)
    optimizer.step()
    assert x.item() == -1.0
    assert "momentum_buffer" not in optimizer.state[x]


def test_the_first_step_of_the_paper_s_form() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    optimizer = PowerSGDOptimizer([x], lr=0.25, momentum=0.5, weight_decay=1.0, maximize=True)
    x.grad = torch.tensor([6.0])
    optimizer.step()  # Δ' = -6 + 2 = -4, m = -4, x = 2 + 0.25 * 8
    assert (x.item(), optimizer.state[x]["momentum_buffer"].item()) == (4.0, -4.0)
    x.grad = torch.tensor([0.0])
    optimizer.step()  # Δ' = 4, m = -2 + 4 = 2, x = 4 - 0.25 * 6
    assert (x.item(), optimizer.state[x]["momentum_buffer"].item()) == (2.5, 2.0)
