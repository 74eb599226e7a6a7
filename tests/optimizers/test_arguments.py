"""Arguments: torch.optim.SGD's in SGD's order, with its errors; and this package's own."""

import inspect
import math
from typing import Any

import pytest
import torch

import efsgd
from efsgd import ErrorFeedbackSGD, PowerSGD, PowerSGDOptimizer


def a_parameter() -> torch.Tensor:
    return torch.zeros(8, 8, requires_grad=True)


@pytest.mark.parametrize("cls", [PowerSGDOptimizer, ErrorFeedbackSGD])
def test_positional_arguments_are_those_of_sgd(cls: type) -> None:
    sgd = inspect.signature(torch.optim.SGD).parameters
    ours = inspect.signature(cls).parameters
    assert list(ours)[: len(sgd)] == list(sgd)
    for name, parameter in sgd.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default)
    extra = list(ours.values())[len(sgd) :]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in extra)


def test_defaults_are_those_of_the_documentation() -> None:
    group = PowerSGDOptimizer([a_parameter()]).param_groups[0]
    expected = {
        "rank": 4, "min_compression_rate": 1.0, "momentum_form": "paper", "warm_start": True,
        "error_feedback": True, "start_compressing_at": 0, "nonfinite": "raise", "seed": 0,
        "lr": 1e-3, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False,
    }  # fmt: skip
    assert {name: group[name] for name in expected} == expected


SGD_ERRORS: list[dict[str, Any]] = [
    {"lr": -1.0},
    {"lr": torch.tensor([0.1, 0.2])},
    {"momentum": -0.1},
    {"weight_decay": -0.1},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
    {"fused": True, "differentiable": True},
    {"fused": True, "foreach": True},
]


@pytest.mark.parametrize("options", SGD_ERRORS, ids=str)
def test_sgd_s_errors_are_raised_with_sgd_s_words(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, RuntimeError)) as expected:
        torch.optim.SGD([a_parameter()], **options)
    with pytest.raises(expected.type) as caught:
        PowerSGDOptimizer([a_parameter()], momentum_form="sgd", **options)
    assert str(caught.value) == str(expected.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"momentum_form": "torch"}, "Must be 'paper' or 'sgd'"),
        ({"nesterov": True, "momentum": 0.9}, "Pass momentum_form='sgd'"),
        ({"dampening": 0.5, "momentum": 0.9}, "Pass momentum_form='sgd'"),
        ({"fused": True}, "Pass momentum_form='sgd'"),
        ({"rank": 0}, "Must be an integer of at least 1"),
        ({"rank": 2.0}, "Must be an integer of at least 1"),
        ({"rank": True}, "Must be an integer of at least 1"),
        ({"min_compression_rate": -1.0}, "Must be a number of at least 0"),
        ({"min_compression_rate": math.nan}, "Must be a number of at least 0"),
        ({"seed": -1}, "Must be an integer, at least 0"),
        ({"start_compressing_at": -1}, "Must be a number of steps"),
        ({"start_compressing_at": 0.5}, "Must be a number of steps"),
        ({"nonfinite": "ignore"}, "Must be 'raise' or 'skip'"),
    ],
    ids=str,
)
def test_errors_of_our_own_name_the_remedy(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PowerSGDOptimizer([a_parameter()], **options)


def test_what_is_not_supported_says_so() -> None:
    matrix = torch.zeros(64, 64, requires_grad=True)
    with pytest.raises(NotImplementedError, match=r"parameter 0, shape \[64, 64\], is compressed"):
        PowerSGDOptimizer([matrix], differentiable=True)


def test_base_class_errors_come_through() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        PowerSGDOptimizer([])
    with pytest.raises(TypeError, match="iterable of Tensors"):
        PowerSGDOptimizer(a_parameter())
    with pytest.raises(ValueError, match="non-leaf"):
        PowerSGDOptimizer([a_parameter() * 2])
    shared = a_parameter()
    with pytest.raises(ValueError, match="more than one parameter group"):
        PowerSGDOptimizer([{"params": [shared]}, {"params": [shared]}])


def test_rank_and_rate_may_differ_between_groups_but_not_everything_may() -> None:
    first, second = a_parameter(), a_parameter()
    optimizer = PowerSGDOptimizer([{"params": [first], "rank": 1}, {"params": [second], "rank": 3}])
    assert optimizer.state[first]["q"].shape == (8, 1)
    assert optimizer.state[second]["q"].shape == (8, 3)
    with pytest.raises(ValueError, match=r"Invalid seed: .* the optimizer as a whole"):
        optimizer.add_param_group({"params": [a_parameter()], "seed": 5})
    with pytest.raises(ValueError, match="Invalid rank"):
        optimizer.add_param_group({"params": [a_parameter()], "rank": 0})
    assert len(optimizer.param_groups) == 2  # what is refused leaves nothing behind


def test_a_group_can_be_added_between_steps() -> None:
    first, second = a_parameter(), a_parameter()
    optimizer = PowerSGDOptimizer([first], lr=0.1, momentum=0.9, rank=2)
    first.grad = torch.randn(8, 8)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "rank": 1, "lr": 0.5})
    assert set(optimizer.state[second]) == set(optimizer.state[first])
    first.grad, second.grad = torch.randn(8, 8), torch.randn(8, 8)
    optimizer.step()
    assert second.abs().sum() > 0
    assert [group["step"] for group in optimizer.param_groups] == [2, 2]


def test_frozen_parameters_are_left_alone_and_can_be_thawed() -> None:
    frozen, free = torch.ones(8, 8), a_parameter()
    optimizer = PowerSGDOptimizer([frozen, free], lr=0.1, weight_decay=0.1, rank=1)
    assert frozen not in optimizer.state
    for _ in range(2):
        free.grad = torch.randn(8, 8)
        optimizer.step()
    assert torch.equal(frozen, torch.ones(8, 8))
    frozen.requires_grad_()
    frozen.grad = torch.randn(8, 8)
    optimizer.step()
    assert not torch.equal(frozen, torch.ones(8, 8))
    free.requires_grad_(False)
    before = free.clone()
    frozen.grad = torch.randn(8, 8)
    optimizer.step()
    assert torch.equal(free, before)


def test_a_closure_runs_once_and_first() -> None:
    parameter = a_parameter()
    optimizer = PowerSGDOptimizer([parameter], lr=0.1)
    calls = []

    def closure() -> torch.Tensor:
        assert torch.is_grad_enabled()
        calls.append(parameter.detach().clone())
        optimizer.zero_grad()
        loss = (parameter - 1).square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == 64.0
    assert len(calls) == 1
    assert torch.equal(calls[0], torch.zeros(8, 8))
    assert not torch.equal(parameter, calls[0])


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
