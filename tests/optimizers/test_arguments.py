"""Arguments of this package's own, and groups. SGD's: swap_in/test_construction.py."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import efsgd
from efsgd import ErrorFeedbackSGD, PowerSGD, PowerSGDOptimizer


def a_parameter() -> torch.Tensor:
    return torch.zeros(8, 8, requires_grad=True)


def test_defaults_are_those_of_the_documentation() -> None:
    group = PowerSGDOptimizer([a_parameter()]).param_groups[0]
    expected = {
        "rank": 4, "min_compression_rate": 1.0, "momentum_form": "paper", "warm_start": True,
        "error_feedback": True, "start_compressing_at": 0, "nonfinite": "raise", "seed": 0,
        "lr": 1e-3, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False,
    }  # fmt: skip
    assert {name: group[name] for name in expected} == expected


def test_a_tensor_learning_rate_is_read_at_each_step() -> None:
    for form in ("paper", "sgd"):
        lr = torch.tensor(0.0)
        parameter = torch.zeros(3, requires_grad=True)
        optimizer = PowerSGDOptimizer([parameter], lr=lr, momentum_form=form)
        parameter.grad = torch.ones(3)
        optimizer.step()
        assert torch.equal(parameter, torch.zeros(3))
        lr.fill_(0.5)
        optimizer.step()
        assert parameter[0].item() == {"paper": -1.0, "sgd": -0.5}[form]
        assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize(
    ("number", "count"),
    [(np.float64, np.int64), (np.array, np.array), (torch.tensor, torch.tensor)],
)
def test_scalars_of_numpy_and_torch_are_numbers(
    number: Callable[[float], Any], count: Callable[[int], Any]
) -> None:
    ends = []
    for real, whole in ((float, int), (number, count)):
        parameter = torch.ones(8, 8, requires_grad=True)
        optimizer = PowerSGDOptimizer(
            [parameter],
            real(0.5),
            real(0.25),
            weight_decay=real(0.125),
            max_grad_norm=real(0.5),
            start_compressing_at=whole(1),
            check_every=whole(2),
        )
        for _ in range(3):
            parameter.grad = torch.ones(8, 8)
            optimizer.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)


def test_error_feedback_sgd_takes_a_compressor() -> None:
    data = [torch.randn(8, 8) for _ in range(3)]
    ends = []
    for make in (
        lambda ps: ErrorFeedbackSGD(ps, 0.1, 0.9, compressor=PowerSGD(rank=2, seed=3)),
        lambda ps: PowerSGDOptimizer(ps, 0.1, 0.9, rank=2, seed=3),
    ):
        parameter = a_parameter()
        optimizer = make([parameter])
        for gradient in data:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach())
    assert torch.equal(*ends)


def test_the_public_names() -> None:
    assert all(hasattr(efsgd, name) for name in efsgd.__all__)
    assert efsgd.__version__.count(".") == 2
    assert "rank: 4" in repr(PowerSGDOptimizer([a_parameter()]))
