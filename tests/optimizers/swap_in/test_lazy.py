"""Lazy modules: an optimizer takes their parameters, which get shapes in the first forward pass."""

from typing import Any

import pytest
import torch
from torch import nn

from efsgd import ErrorFeedbackSGD, GradientAverager, PowerSGDOptimizer, Signum, TopK
from efsgd.testing.gradients import made_up
from tests.simulation import bits, parameters_of, step_with

SHAPES = [(9, 8), (9,), (5, 9), (5,)]
KINDS: list[Any] = [
    lambda p: PowerSGDOptimizer(p, lr=0.1, momentum=0.9, rank=2),
    lambda p: ErrorFeedbackSGD(p, lr=0.1, momentum=0.9, compressor=TopK(density=0.2)),
    lambda p: Signum(p, lr=0.1),
    GradientAverager,
]


def lazy_model() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(9), nn.Tanh(), nn.LazyLinear(5))


def materialize(model: nn.Module) -> None:
    """What the first forward pass does, with values that are the same in every run."""
    model(torch.zeros(2, 8))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(made_up("gaussian", tuple(parameter.shape), number))


def trained(workers: list[Any]) -> Any:
    for step in range(3):
        gradients = [
            [made_up("gaussian", shape, worker, step, n).float() for n, shape in enumerate(SHAPES)]
            for worker in range(len(workers))
        ]
        step_with(workers, gradients)
    states = [[dict(each.state[p]) for p in parameters_of(each)] for each in workers]
    return bits([[parameters_of(each) for each in workers], states])


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("has_stepped", [False, True])
def test_lazy_parameters_are_taken(make: Any, world_size: int, has_stepped: bool) -> None:
    lazy, eager = ([lazy_model() for _ in range(world_size)] for _ in range(2))
    for model in eager:
        materialize(model)
    workers = [make(model.parameters()) for model in lazy]
    if has_stepped:  # a step that finds nothing to train, as torch's optimizers take it
        step_with(workers, [[None] * len(SHAPES) for _ in workers])
    for model in lazy:
        materialize(model)
    expected = [make(model.parameters()) for model in eager]
    if has_stepped:
        step_with(expected, [[None] * len(SHAPES) for _ in expected])
    assert trained(workers) == trained(expected)


def test_one_lazy_module_among_others_waits() -> None:
    model = nn.Sequential(nn.Linear(8, 9), nn.LazyLinear(5))
    optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1, momentum=0.9, rank=2)
    for parameter in model[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    before = bits(model[0].weight)
    optimizer.step()
    assert bits(model[0].weight) != before
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert set(optimizer.state[model[1].weight]) >= {"momentum_buffer", "error", "q"}
