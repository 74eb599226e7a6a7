"""B1 to B6: the rule by which a step updates."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contract.adapters import Adapter, Loop
from benchmarks.contract.made import given, noise, same
from benchmarks.contract.questions import require, row

#: Combinations of SGD's settings.
RULES: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "maximize": True},
]


def sgd_twin(model: nn.Module, **settings: Any) -> Loop:
    """torch.optim.SGD with a copy of the model."""
    twin = copy.deepcopy(model)
    return Loop(twin, torch.optim.SGD(twin.parameters(), **{"lr": 0.1, **settings}))


@row(
    "B1",
    "`step(closure)`",
    "The closure is called once, with gradients enabled, and its value is returned.",
)
def closures(adapter: Adapter) -> None:
    model = given()
    loop, calls = adapter.loop(model), []
    before = copy.deepcopy(model)

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        loop.zero_grad()
        return loop.backward(noise(model, 0))

    value = loop.step(closure)
    require(calls == [True], f"the closure was called {len(calls)} times")
    require(isinstance(value, Tensor), f"step returned {value!r}, not the loss")
    require(not same(model, before), "nothing moved")


@row(
    "B2",
    "No gradient: untouched. Zero gradient: decays, keeps its momentum",
    "With momentum and weight decay, a parameter has a gradient, then none, then one of zeros.",
)
def missing_gradients(adapter: Adapter) -> None:
    model = given((12, 10), (9, 14))
    loop = adapter.loop(model, unused=True, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        loop.train(noise(model, step))
    other = model.weights[1]
    kept = {k: v.clone() for k, v in loop.optimizer.state[other].items()}
    before = other.detach().clone()
    loop.train([noise(model, 3)[0], None])
    require(torch.equal(other, before), "a parameter without a gradient moved")
    for name, value in loop.optimizer.state[other].items():
        require(torch.equal(value, kept[name]), f"its {name} changed without a gradient")
    loop.train([noise(model, 4)[0], torch.zeros_like(other)])
    require(not torch.equal(other, before), "a parameter with a gradient of zeros stood still")


@row(
    "B3",
    "SGD's order of operations; weight decay is not compressed",
    "Gradients of rank one, which rank-1 compression sends exactly, parameters of full rank: six "
    "steps are those of SGD, to 1e-5, for seven combinations of settings.",
)
def order_of_operations(adapter: Adapter) -> None:
    adapter.needs_sgd()
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, generator=generator) for n in (12, 10))
    for settings in RULES:
        model = given((12, 10))
        loop, twin = adapter.loop(model, **settings), sgd_twin(model, **settings)
        for step in range(6):
            gradient = (1 + step) * torch.outer(left, right)
            loop.train([gradient])
            twin.train([gradient])
        require(same(model, twin.model, 1e-5), f"{settings}: other parameters than SGD's")


@row(
    "B4",
    "One worker: SGD bit by bit without compression, to rounding at full rank",
    "Four steps with seven combinations of settings; full rank to 1e-5.",
)
def parity(adapter: Adapter) -> None:
    adapter.needs_sgd()
    for settings in RULES:
        model = given()
        loop, twin = adapter.loop(model, rank=None, **settings), sgd_twin(model, **settings)
        exact = given((12, 10), (8, 8))
        full = adapter.loop(exact, rank=12, rate=0.0, **settings)
        full_twin = sgd_twin(exact, **settings)
        for step in range(4):
            for trained in (loop, twin):
                trained.train(noise(model, step))
            for trained in (full, full_twin):
                trained.train(noise(exact, step))
        require(same(model, twin.model), f"{settings}: not bitwise SGD's without compression")
        require(same(exact, full_twin.model, 1e-5), f"{settings}: not SGD's at full rank")


@row(
    "B5",
    "Learning rates as tensors, changed in place",
    "A tensor of no or one dimension; set to zero in place, nothing moves any more; the group "
    "keeps the same object. weight_decay as a tensor, too.",
)
def tensor_settings(adapter: Adapter) -> None:
    for lr in (torch.tensor(0.1), torch.tensor([0.1])):
        model = given((12, 10), (9, 14))
        loop = adapter.loop(model, lr=lr, weight_decay=torch.tensor(0.1))
        before = copy.deepcopy(model)
        loop.train(noise(model, 0))
        require(not same(model, before), "nothing moved")
        lr.fill_(0.0)
        before = copy.deepcopy(model)
        loop.train(noise(model, 1))
        require(same(model, before), "a change of the learning rate in place had no effect")
        require(loop.optimizer.param_groups[0]["lr"] is lr, "the group has another object")


@row(
    "B6",
    "Settings are read from the groups at each step",
    "lr set to zero: nothing moves. For SGD's rule, momentum and weight_decay are changed as well, "
    "and the parameters are SGD's.",
)
def settings_are_read(adapter: Adapter) -> None:
    model = given()
    loop = adapter.loop(model, rank=None, momentum=0.5)
    twin = sgd_twin(model, momentum=0.5)
    changes: list[dict[str, Any]] = [{}, {"lr": 0.3}, {}]
    changes += [{"momentum": 0.9}, {"weight_decay": 0.2}] if adapter.is_sgd else []
    for step, change in enumerate(changes):
        for trained in (loop, twin):
            for group in trained.optimizer.param_groups:
                group.update(change)
            trained.train(noise(model, step))
    require(not adapter.is_sgd or same(model, twin.model), "other parameters than SGD's")
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(model)
    loop.train(noise(model, 9))
    require(same(model, before), "lr=0 had no effect")
