"""F: schedulers, mixed precision, frameworks."""

import copy
import importlib
import inspect
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from benchmarks.contract.adapters import Adapter, Loop
from benchmarks.contract.made import given, noise, require_equal_workers, require_finite, same
from benchmarks.contract.probes.copies import trained
from benchmarks.contract.probes.rules import sgd_twin
from benchmarks.contract.questions import NotApplicable, describe_error, require, row

__all__: list[str] = []


@row(
    "F1",
    "It is a `torch.optim.Optimizer`",
    "What is given to schedulers is an instance, and a scheduler takes it.",
)
def is_optimizer(adapter: Adapter) -> None:
    loop = trained(adapter)
    require(isinstance(loop.optimizer, Optimizer), f"{type(loop.optimizer).__name__} is none")
    lr_scheduler.LambdaLR(loop.optimizer, lambda _: 1.0)


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.05),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
}


@row(
    "F2",
    "Every scheduler of torch, those that cycle momentum too",
    "Sixteen of them, six steps each; learning rates are those of the same scheduler on SGD, and "
    "parameters move.",
)
def schedulers(adapter: Adapter) -> None:
    for name, make in SCHEDULERS.items():
        loop = trained(adapter, steps=1)
        twin = sgd_twin(loop.model, momentum=0.9)
        before = copy.deepcopy(loop.model)
        try:
            pair = [make(trained.optimizer) for trained in (loop, twin)]
        except Exception as error:
            require(False, f"{name}: {describe_error(error)}")
        for step in range(6):
            for run, scheduler in zip((loop, twin), pair, strict=True):
                run.train(noise(run.model, step))
                metrics = [1.0] if name == "ReduceLROnPlateau" else []
                scheduler.step(*metrics)
            rates = [run.optimizer.param_groups[0]["lr"] for run in (loop, twin)]
            require(rates[0] == rates[1], f"{name}: lr {rates[0]}, not {rates[1]}")
        require(not same(loop.model, before), f"{name}: nothing moved")


@row(
    "F3",
    "GradScaler: all workers skip an overflow, and nothing has changed",
    "One of two workers overflows once; with gradients still scaled, and unscaled and clipped. "
    "Parameters and state stay as they were; six steps later they are finite, moved, and equal.",
    workers=2,
)
def loss_scaling(adapter: Adapter) -> None:
    for unscaled in (False, True):
        model = given()
        loop = adapter.loop(model, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(4):
            _scaled(loop, scaler, step, unscaled)
        before, kept = copy.deepcopy(model), copy.deepcopy(_tensors(loop))
        _scaled(loop, scaler, 4, unscaled, overflows=dist.get_rank() == 1)
        require_finite(model, "in the parameters after an overflow")
        require(same(model, before), "parameters moved in a step that overflowed")
        unchanged = all(torch.equal(*pair) for pair in zip(_tensors(loop), kept, strict=True))
        require(unchanged, "state changed in a step that overflowed")
        for step in range(5, 11):
            _scaled(loop, scaler, step, unscaled)
        require_finite(model, "in the parameters, later")
        require(not same(model, before), "no later step was finite, so none was taken")
        require_equal_workers(model, "after an overflow")


def _tensors(loop: Loop) -> list[Tensor]:
    states = loop.optimizer.state_dict()["state"].values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def _scaled(loop: Loop, scaler: Any, step: int, unscaled: bool, *, overflows: bool = False) -> None:
    gradients = noise(loop.model, step, dist.get_rank())
    if overflows:
        gradients[0] = torch.full_like(loop.model.weights[0], torch.inf)
    loop.zero_grad()
    # On a loss of its own the scaler makes its scale, which it does when it is first used.
    loop.backward(gradients, float(scaler.scale(torch.ones(()))))
    if unscaled:
        scaler.unscale_(loop.optimizer)
        torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 1.0)
    loop.scaled_step(scaler)
    scaler.update()


@row(
    "F4",
    "A disabled GradScaler passes the step on",
    "`scaler.step(optimizer)` with enabled=False, on two workers: they stay equal. `step` has no "
    "deprecated argument `grad_scaler`.",
    workers=2,
)
def disabled_scaler(adapter: Adapter) -> None:
    model = given()
    loop = adapter.loop(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(4):
        loop.zero_grad()
        loop.backward(noise(model, step, dist.get_rank()))
        scaler.step(loop.optimizer)
        scaler.update()
        require_equal_workers(model, "after scaler.step(optimizer)")
    require("grad_scaler" not in inspect.signature(loop.optimizer.step).parameters, "deprecated")


@row(
    "F5",
    "ZeroRedundancyOptimizer, optimizers in the backward pass: supported, or refused",
    "Four steps of two workers, who stay equal; or an error on both before anything hangs.",
    workers=2,
)
def sharded_or_in_backward(adapter: Adapter) -> str:
    remarks = []
    for what, make in {"ZeroRedundancyOptimizer": _zero, "in backward": _in_backward}.items():
        model = given((12, 10), (9, 14), (12, 10))
        try:
            train = make(adapter, model)
            for step in range(4):
                train(noise(model, step, dist.get_rank()))
        except NotApplicable as reason:
            remarks.append(f"{what}: {reason}")
        except Exception as error:
            is_late = isinstance(error, dist.DistError) or "imed out" in str(error)
            require(not is_late, f"{what}: {describe_error(error)}")
            remarks.append(f"{what} is refused: {describe_error(error)}")
        else:
            try:
                require_equal_workers(model, "after four steps")
            except AssertionError as difference:
                require(False, f"{what}: {difference}")
    return "; ".join(remarks)


def _zero(adapter: Adapter, model: Any) -> Callable[[Any], Any]:
    optim = importlib.import_module("torch.distributed.optim")  # it warns when it is imported
    factory = partial(optim.ZeroRedundancyOptimizer, optimizer_class=adapter.optimizer_class)
    return adapter.loop(model, list(model.parameters()), factory=factory).train


def _in_backward(adapter: Adapter, model: Any) -> Callable[[Any], Any]:
    optim = importlib.import_module("torch.distributed.optim")
    wrapped = adapter.in_backward(model, optim._apply_optimizer_in_backward)
    return lambda gradients: wrapped(gradients).backward()


@row(
    "F6",
    "Frameworks: whole iterations in the closure, patched steps, subclasses",
    "As Lightning, Accelerate and Horovod do: a closure that zeroes, computes and propagates; a "
    "replaced `step` that passes it on by position; a subclass made at run time.",
)
def frameworks(adapter: Adapter) -> None:
    loop = trained(adapter)
    optimizer, before = loop.optimizer, copy.deepcopy(loop.model)
    cls = type(optimizer)
    optimizer.__class__ = type(f"Distributed{cls.__name__}", (cls,), {})
    inner = optimizer.step

    def replaced(self: Any, closure: Any = None) -> Any:
        return inner(closure)

    optimizer.step = types.MethodType(replaced, optimizer)

    def iteration() -> Tensor:
        loop.zero_grad()
        return loop.backward(noise(loop.model, 7))

    require(isinstance(loop.step(iteration), Tensor), "the loss is not returned")
    require(not same(loop.model, before), "nothing moved")


@row(
    "F7",
    "`torch.compile` of the step",
    'With `backend="eager"`, which traces as any backend does: four steps are those of a run that '
    "is not compiled, to 1e-5.",
    limit=600.0,  # a peer compiles parts of its step by itself, with the default backend
)
def compiled(adapter: Adapter) -> None:
    loop, twin = trained(adapter), trained(adapter)
    step = torch.compile(loop.step, backend="eager")
    for number in range(4, 8):
        torch.manual_seed(number)
        loop.zero_grad()
        loop.backward(noise(loop.model, number))
        with torch.compiler.set_stance("default"):
            step()
    for number in range(4, 8):
        torch.manual_seed(number)
        twin.train(noise(twin.model, number))
    require(same(loop.model, twin.model, 1e-5), "other parameters than without torch.compile")


@row(
    "F8",
    "No setting named `capturable`",
    "torch loads the step counts of optimizers that have it in another way; SGD has it not.",
)
def capturable(adapter: Adapter) -> None:
    loop = adapter.loop(given())
    for group in loop.optimizer.param_groups:
        require("capturable" not in group, "there is one")
