"""E: hooks, what may be patched, names in the profiler, zero_grad and repr."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from efsgd import ErrorFeedbackSGD, PowerSGDOptimizer
from tests.optimizers.swap_in.pairs import UNCOMPRESSED, give, gradients, pair, start
from tests.simulation import bits, parameters_of


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """What global hooks have seen; they are removed at the end."""
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    yield seen
    for handle in handles:
        handle.remove()


def an_optimizer(cls: type = PowerSGDOptimizer, **options: Any) -> Any:
    optimizer = cls(start(), lr=0.1, **options)
    give(optimizer, gradients(parameters_of(optimizer), 0))
    return optimizer


@pytest.mark.parametrize("after_sgd", [False, True])
@pytest.mark.parametrize("cls", [PowerSGDOptimizer, ErrorFeedbackSGD])
def test_each_hook_is_called_once_in_order(cls: type, after_sgd: bool, calls: list[str]) -> None:
    """E1: also in a process in which a plain SGD has been made before."""
    if after_sgd:
        an_optimizer(SGD).step()
        calls.clear()
    optimizer = an_optimizer(cls)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step(lambda: calls.append("step"))
    assert calls == ["global pre", "pre", "step", "post", "global post"]


def test_a_subclass_calls_hooks_as_one_of_sgd_does(calls: list[str]) -> None:
    """E1: where `step` calls ours through super(), torch calls global hooks for both."""

    def called_by(base: type) -> list[str]:
        class Derived(base):
            def step(self, closure: Any = None) -> Any:
                calls.append("derived")
                return super().step(closure)

        an_optimizer(base).step()  # torch has wrapped the base's `step` by now
        optimizer = an_optimizer(Derived)
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        calls.clear()
        optimizer.step()
        return list(calls)

    expected = called_by(SGD)
    assert expected.count("derived") == 1
    assert called_by(PowerSGDOptimizer) == expected


def test_hooks_can_be_removed_and_replace_arguments() -> None:
    """E1: a pre-hook may return other arguments; a handle ends it."""
    optimizer, results = an_optimizer(), []
    handle = optimizer.register_step_pre_hook(
        lambda which, args, kwargs: ((which, lambda: "from the hook"), {})
    )
    results.append(optimizer.step(lambda: "from the caller"))
    handle.remove()
    results.append(optimizer.step(lambda: "from the caller"))
    assert results == ["from the hook", "from the caller"]


def test_a_hook_that_changes_gradients() -> None:
    """E1: what a pre-hook does to gradients is done before they are read."""
    ours, theirs = pair(start(), UNCOMPRESSED, lr=0.1)
    for optimizer in (ours, theirs):
        give(optimizer, gradients(parameters_of(optimizer), 0))

        def halve(which: Optimizer, args: Any, kwargs: Any) -> None:
            for p in parameters_of(which):
                p.grad.mul_(0.5)

        optimizer.register_step_pre_hook(halve)
        optimizer.step()
    assert bits(parameters_of(ours)) == bits(parameters_of(theirs))


def test_step_is_a_method() -> None:
    """E2: an ordinary one of the class, that can be replaced on class and instance."""
    optimizer = an_optimizer()
    assert inspect.ismethod(optimizer.step)
    assert optimizer.step.__func__ is type(optimizer).step
    assert optimizer.step.__name__ == type(optimizer).step.__name__ == "step"
    assert list(inspect.signature(optimizer.step).parameters) == ["closure"]
    assert not any("__slots__" in vars(cls) for cls in type(optimizer).__mro__)
    optimizer.step = lambda closure=None: "patched"
    assert optimizer.step() == "patched"
    del optimizer.step
    assert optimizer.step() is None


def test_names_in_the_profiler() -> None:
    """E3: those that tools look for."""
    optimizer = an_optimizer()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.events() if event.name.startswith("Optimizer.")]
    assert names == [
        "Optimizer.step#PowerSGDOptimizer.step",
        "Optimizer.zero_grad#PowerSGDOptimizer.zero_grad",
    ]


@pytest.mark.parametrize("foreach", [None, False, True])
def test_zero_grad(foreach: bool | None) -> None:
    """E4: sets gradients to None, or to zero, as asked; a step takes either."""
    optimizer = an_optimizer(foreach=foreach)
    optimizer.zero_grad(set_to_none=False)
    before = bits(parameters_of(optimizer))
    assert all(p.grad is not None and not p.grad.any() for p in parameters_of(optimizer))
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters_of(optimizer))
    optimizer.step()
    assert bits(parameters_of(optimizer)) == before
    assert {"foreach", "fused", "differentiable"} <= optimizer.defaults.keys()


def test_repr() -> None:
    """E5: all settings in order, and no parameters."""
    optimizer = PowerSGDOptimizer([{"params": start()}, {"params": start(), "lr": 0.5}], lr=0.1)
    lines = repr(optimizer).splitlines()
    settings = [line.split(":")[0].strip() for line in lines if ":" in line]
    half = len(settings) // 2
    assert settings[:half] == settings[half:] == sorted(optimizer.defaults)
    assert "tensor" not in repr(optimizer)
    assert lines[0].startswith("PowerSGDOptimizer (")
