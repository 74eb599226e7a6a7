"""`momentum_form="sgd"` is torch.optim.SGD; `"paper"` is what it says it is."""

import itertools
from typing import Any

import pytest
import torch

from efsgd import PowerSGDOptimizer
from tests.simulation import difference, make_workers, parameters_of, step_with
from tests.strategies import Scenario

GRID = [
    dict(zip(("momentum", "dampening", "weight_decay", "nesterov", "maximize"), v, strict=True))
    for v in itertools.product((0.0, 0.9), (0.0, 0.3), (0.0, 0.1), (False, True), (False, True))
]
COMBINATIONS = [c for c in GRID if not c["nesterov"] or (c["momentum"] and not c["dampening"])]
SHAPES = [(12, 10), (10,), (4, 3, 3, 3), (), (0, 3), (12, 10)]


def a_run(dtype: torch.dtype) -> tuple[list[torch.Tensor], list[list[torch.Tensor | None]]]:
    each = len(SHAPES)
    # One parameter gets its first gradient late: its first momentum is that of a later step.
    missing = frozenset({(0, 0, 1), (1, 0, 1), (2, 0, 0)})
    scenario = Scenario(SHAPES, 1, {}, 5, 3, ["gaussian"] * each, ["contiguous"] * each, missing)
    gradients = [scenario.gradients(step)[0] for step in range(5)]
    rounded = [[None if g is None else g.to(dtype) for g in own] for own in gradients]
    return [p.to(dtype) for p in scenario.parameters()], rounded


def train(optimizer: torch.optim.Optimizer, gradients: list[list[torch.Tensor | None]]) -> None:
    for own in gradients:
        for parameter, gradient in zip(parameters_of(optimizer), own, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nothing_compressed_is_sgd_to_the_bit(
    options: dict[str, Any], foreach: bool | None, dtype: torch.dtype
) -> None:
    start, gradients = a_run(dtype)
    ours = [p.clone().requires_grad_() for p in start]
    theirs = [p.clone().requires_grad_() for p in start]
    optimizer = PowerSGDOptimizer(ours, 0.1, **options, foreach=foreach, momentum_form="sgd",
                                  min_compression_rate=float("inf"))  # fmt: skip
    expected = torch.optim.SGD(theirs, 0.1, **options, foreach=foreach)
    train(optimizer, gradients)
    train(expected, gradients)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        buffer = expected.state[other].get("momentum_buffer")
        if buffer is not None:
            assert torch.equal(optimizer.state[mine]["momentum_buffer"], buffer)


@pytest.mark.parametrize("options", [c for c in COMBINATIONS if not c["dampening"]], ids=str)
def test_fused_is_sgd_s_fused_to_the_bit(options: dict[str, Any]) -> None:
    start, gradients = a_run(torch.float32)
    ours = [p.clone().requires_grad_() for p in start]
    theirs = [p.clone().requires_grad_() for p in start]
    optimizer = PowerSGDOptimizer(ours, 0.1, **options, fused=True, momentum_form="sgd",
                                  min_compression_rate=float("inf"))  # fmt: skip
    # torch's own fused SGD fails where some parameters have a momentum and others do not yet.
    train(optimizer, gradients[3:])
    train(torch.optim.SGD(theirs, 0.1, **options, fused=True), gradients[3:])
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_fused_serves_parameters_whose_first_gradient_comes_late() -> None:
    start, gradients = a_run(torch.float32)
    ends = []
    for fused in (True, None):
        ps = [p.clone().requires_grad_() for p in start]
        train(PowerSGDOptimizer(ps, 0.1, 0.9, fused=fused, momentum_form="sgd"), gradients)
        ends.append(ps)
    for a, b in zip(*ends, strict=True):
        assert difference(a, b) < 1e-6  # the fused kernel multiplies and adds in one rounding


@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_full_rank_is_sgd_to_rounding(options: dict[str, Any]) -> None:
    start, gradients = a_run(torch.float64)
    ours = [p.clone().requires_grad_() for p in start]
    theirs = [p.clone().requires_grad_() for p in start]
    optimizer = PowerSGDOptimizer(
        ours, 0.1, **options, momentum_form="sgd", rank=99, min_compression_rate=0.0
    )
    train(optimizer, gradients)
    train(torch.optim.SGD(theirs, 0.1, **options), gradients)
    for mine, other in zip(ours, theirs, strict=True):
        assert difference(mine, other) < 1e-12  # P̂ P̂^T is the identity to a few 1e-16


@pytest.mark.parametrize("world_size", [2, 4])
def test_uncompressed_workers_are_sgd_on_the_mean_gradient(world_size: int) -> None:
    each = len(SHAPES)
    scenario = Scenario(SHAPES, world_size, {}, 4, 3, ["gaussian"] * each, ["contiguous"] * each)
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
