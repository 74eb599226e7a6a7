"""E: hooks, the profiler, and small methods."""

import types
from typing import Any

import torch
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from benchmarks.contract.adapters import Adapter
from benchmarks.contract.made import given, noise
from benchmarks.contract.probes.copies import trained
from benchmarks.contract.questions import require, row

__all__: list[str] = []


@row(
    "E1",
    "Hooks of the step fire once, in order; they may replace arguments",
    "Global and local hooks before and after, in a process that has made an SGD, too; then a hook "
    "that adds a closure.",
)
def step_hooks(adapter: Adapter) -> None:
    torch.optim.SGD(given().parameters())
    loop, seen = trained(adapter), []
    optimizer = loop.optimizer
    loop.zero_grad()
    loop.backward(noise(loop.model, 4))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global before")),
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global after")),
    ]
    loop.step()
    require(seen == ["global before", "before", "after", "global after"], f"called: {seen}")
    for handle in handles:
        handle.remove()
    loop.step()
    require(len(seen) == 4, "hooks that were removed are called")

    def with_closure(_: Any, args: Any, __: Any) -> Any:
        return args[:1], {"closure": lambda: seen.append("closure")}

    optimizer.register_step_pre_hook(with_closure)
    loop.step()
    require(seen[4:] == ["closure"], "the arguments that a hook returned are not used")


@row(
    "E2",
    "`step` is a method that can be patched",
    "On the instance, as schedulers do, and on the class; the patches are called once per step.",
)
def patched_step(adapter: Adapter) -> None:
    loop = trained(adapter)
    step = loop.optimizer.step
    require(step.__name__ == "step" and step.__func__, "step is not a method")
    StepLR(loop.optimizer, 1)
    calls = []
    inner = loop.optimizer.step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return inner(*args, **kwargs)

    loop.optimizer.step = types.MethodType(counted, loop.optimizer)
    loop.train(noise(loop.model, 5))
    require(calls == [loop.optimizer], f"{len(calls)} calls of the instance's step in one step")
    fresh, cls = trained(adapter), type(loop.optimizer)
    original, calls[:] = cls.step, []

    def counted_too(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return original(self, *args, **kwargs)

    cls.step = counted_too
    try:
        fresh.train(noise(fresh.model, 5))
    finally:
        cls.step = original
    require(calls == [fresh.optimizer], f"{len(calls)} calls of the class's step in one step")


@row(
    "E3",
    "Names in the profiler",
    "`Optimizer.step#<class>.step` and `Optimizer.zero_grad#<class>.zero_grad`.",
)
def profiler_names(adapter: Adapter) -> None:
    loop = trained(adapter)
    with torch.profiler.profile() as profile:
        loop.backward(noise(loop.model, 5))
        loop.step()
        loop.optimizer.zero_grad()
    found = {event.key for event in profile.key_averages()}
    name = type(loop.optimizer).__name__
    for expected in (f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"):
        require(expected in found, f"there is no {expected}")


@row(
    "E4",
    "`zero_grad()` before each backward pass",
    "With set_to_none or not, gradients are gone. Where matrices are compressed at rank 1, a "
    "constant gradient of full rank is applied, but for a tenth, after 300 steps all the same.",
)
def zero_grad(adapter: Adapter) -> str | None:
    for to_none in (True, False):
        loop = trained(adapter)
        loop.optimizer.zero_grad(set_to_none=to_none)
        for p in loop.model.parameters():
            gone = p.grad is None if to_none else not p.grad.any()
            require(gone, f"a gradient is left by set_to_none={to_none}")
    if not adapter.is_sgd:
        return None
    model = given((12, 10))
    gradient = noise(model, 0)
    assert gradient[0] is not None
    before = model.weights[0].detach().clone()
    loop = adapter.loop(model, lr=1.0)
    for _ in range(300):
        loop.optimizer.zero_grad()
        loop.backward(gradient)
        loop.step()
    applied = (before - model.weights[0].detach()) / 300
    missing = float((applied - gradient[0]).norm() / gradient[0].norm())
    require(missing < 0.1, f"{100 * missing:.0f} % of the gradients are never applied")
    return None


@row(
    "E5",
    "`repr` shows the settings",
    "The class, and the learning rate of each group; no tensor.",
)
def representation(adapter: Adapter) -> None:
    loop = trained(adapter)
    text = repr(loop.optimizer)
    require(type(loop.optimizer).__name__ in text and "lr: 0.1" in text, text)
    require("tensor(" not in text, "a tensor is printed")
