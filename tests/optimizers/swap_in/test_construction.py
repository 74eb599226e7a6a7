"""A: construction. The same arguments, the same errors, the same kinds of parameter lists."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD

from efsgd import ErrorFeedbackSGD, PowerSGDOptimizer
from tests.optimizers.swap_in.pairs import (
    UNCOMPRESSED,
    assert_equal,
    pair,
    skip_unless_sgd_takes,
    start,
    train,
)


def a_parameter() -> Tensor:
    return torch.ones(6, 5, requires_grad=True)


@pytest.mark.parametrize("cls", [PowerSGDOptimizer, ErrorFeedbackSGD])
def test_signature(cls: type) -> None:
    """A1: SGD's arguments, in its order, with its kinds and defaults; then ours, by keyword."""
    theirs, ours = (inspect.signature(c).parameters for c in (SGD, cls))
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all((ours[n].kind, ours[n].default) == (p.kind, p.default) for n, p in theirs.items())
    assert all(p.kind is p.KEYWORD_ONLY for p in list(ours.values())[len(theirs) :])


def test_defaults() -> None:
    """A1: `defaults` and groups hold SGD's settings with SGD's values."""
    ours, theirs = PowerSGDOptimizer([a_parameter()]), SGD([a_parameter()])
    assert theirs.defaults.items() <= ours.defaults.items()
    group = {k: v for k, v in theirs.param_groups[0].items() if k != "params"}
    assert group.items() <= ours.param_groups[0].items()


def test_positional_arguments() -> None:
    """A1: given by position they mean what they mean to SGD."""
    ours, theirs = (
        PowerSGDOptimizer([a_parameter()], 0.1, 0.9, 0, 0.01, True, momentum_form="sgd"),
        SGD([a_parameter()], 0.1, 0.9, 0, 0.01, True),
    )
    assert theirs.defaults.items() <= ours.defaults.items()


REFUSED: list[dict[str, Any]] = [
    {"lr": -1.0},
    {"lr": torch.tensor(-0.5)},
    {"lr": torch.tensor([0.1, 0.2])},
    {"momentum": -0.5},
    {"weight_decay": -0.1},
    {"weight_decay": torch.tensor(-0.1)},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
    {"fused": True, "differentiable": True},
    {"fused": True, "foreach": True},
]


@pytest.mark.parametrize("options", REFUSED, ids=lambda options: f"A2 {options}")
def test_what_sgd_refuses(options: dict[str, Any]) -> None:
    """A2: the same exceptions with the same texts."""
    with pytest.raises((ValueError, RuntimeError)) as expected:
        SGD([a_parameter()], **options)
    with pytest.raises(expected.type) as caught:
        PowerSGDOptimizer([a_parameter()], **options, momentum_form="sgd")
    assert str(caught.value) == str(expected.value)


ACCEPTED: list[dict[str, Any]] = [
    {"lr": 0.0},
    {"lr": torch.tensor([0.1])},
    {"dampening": 0.5},
    {"momentum": 1.5},
    {"momentum": 0.9, "dampening": -0.5},
    {"weight_decay": torch.tensor(0.1)},
    {"foreach": False, "fused": True},
]


@pytest.mark.parametrize("options", ACCEPTED, ids=lambda options: f"A2 {options}")
def test_what_sgd_accepts(options: dict[str, Any]) -> None:
    """A2: nothing that SGD takes is refused, odd as it may be, and it has the same effect."""
    skip_unless_sgd_takes(**options)
    optimizers = pair(start(), UNCOMPRESSED, **options)
    train(optimizers, range(3))
    assert_equal(*optimizers)


def two_groups_with_one_parameter() -> Any:
    shared = a_parameter()
    return [{"params": [shared]}, {"params": [shared]}]


BAD_PARAMETERS: dict[str, Callable[[], Any]] = {
    "empty list": list,
    "bare tensor": a_parameter,
    "numbers": lambda: [1.0, 2.0],
    "not a leaf": lambda: [a_parameter() * 2],
    "set in a group": lambda: [{"params": {a_parameter()}}],
    "one parameter in two groups": two_groups_with_one_parameter,
    "some names missing": lambda: [("weight", a_parameter()), a_parameter()],
    "a group without names": lambda: [
        {"params": [("weight", a_parameter())]},
        {"params": [a_parameter()]},
    ],
    "a group with names": lambda: [
        {"params": [a_parameter()]},
        {"params": [("weight", a_parameter())]},
    ],
}


@pytest.mark.parametrize("make", BAD_PARAMETERS.values(), ids=[f"A3 {k}" for k in BAD_PARAMETERS])
def test_errors_of_the_base_class(make: Callable[[], Any]) -> None:
    """A3: they come through as they are."""
    with pytest.raises((TypeError, ValueError)) as expected:
        SGD(make())
    with pytest.raises(expected.type) as caught:
        PowerSGDOptimizer(make())
    assert str(caught.value) == str(expected.value)


def test_duplicates_in_a_group_warn() -> None:
    """A3: as with SGD, and training goes on, with one update per step."""
    twice = a_parameter()
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        optimizer = PowerSGDOptimizer([twice, twice], lr=1.0, **UNCOMPRESSED)
    twice.grad = torch.ones_like(twice)
    optimizer.step()
    assert torch.equal(twice, torch.zeros_like(twice))


def test_kinds_of_parameter_lists() -> None:
    """A4: lists, iterators, generators, names, groups, and a group of a single tensor."""

    def named(p: Tensor) -> list[tuple[str, Tensor]]:
        return [("weight", p)]

    made: list[Callable[[Tensor], Any]] = [
        lambda p: [p],
        lambda p: iter([p]),
        lambda p: (q for q in [p]),
        lambda p: (p,),
        named,
        lambda p: iter(named(p)),
        lambda p: [{"params": [p]}],
        lambda p: [{"params": p}],
        lambda p: [{"params": (q for q in [p])}],
        lambda p: iter([{"params": named(p)}]),
    ]  # fmt: skip
    for make in made:
        p = a_parameter()
        optimizer = PowerSGDOptimizer(make(p), lr=0.5, **UNCOMPRESSED)
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(p, torch.full_like(p, 0.5))
        assert len(optimizer.param_groups) == 1


def a_step() -> Tensor:
    p = a_parameter()
    optimizer = PowerSGDOptimizer([p], lr=0.5, **UNCOMPRESSED)
    p.grad = torch.ones_like(p)
    optimizer.step()
    return p.detach()


def test_without_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A5: torch may be built without it."""
    expected = a_step()  # without a process group
    monkeypatch.setattr(dist, "is_available", lambda: False)
    monkeypatch.setattr(dist, "is_initialized", lambda: pytest.fail("does not exist then"))
    assert torch.equal(a_step(), expected)


def test_a_process_group_that_comes_later() -> None:
    """A5: the group is looked up at each step. Several workers: tests/wire/test_processes.py."""
    p = a_parameter()
    optimizer = PowerSGDOptimizer([p], lr=0.5, **UNCOMPRESSED)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.process_group = dist.group.WORLD
        optimizer.step()
    finally:
        dist.destroy_process_group()
    with pytest.raises(RuntimeError, match=r"Assign another one, or None"):
        optimizer.step()
    optimizer.process_group = None
    optimizer.step()
    assert torch.equal(p, torch.full_like(p, -0.5))


def test_what_cannot_be_trained_is_left_alone() -> None:
    """A6: tensors that need no gradient, integers among them, are accepted."""
    integers, frozen, free = torch.arange(6), torch.ones(4, 4), a_parameter()
    optimizer = PowerSGDOptimizer([integers, frozen, free], lr=0.5, momentum=0.9, weight_decay=0.1)
    free.grad = torch.ones_like(free)
    optimizer.step()
    assert torch.equal(integers, torch.arange(6))
    assert torch.equal(frozen, torch.ones(4, 4))
    assert not torch.equal(free, torch.ones_like(free))
    assert set(optimizer.state) == {free}
