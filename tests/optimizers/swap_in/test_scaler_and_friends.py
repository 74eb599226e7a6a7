"""F3 to F8: loss scaling, and what else takes hold of an optimizer.

F5 with several workers, and DistributedDataParallel, are the matter of tests over real processes.
"""

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import SGD, Optimizer

from efsgd import NonFiniteGradientError, PowerSGDOptimizer
from tests.optimizers.swap_in.pairs import (
    FORMS,
    FULL_RANK,
    UNCOMPRESSED,
    assert_equal,
    give,
    gradients,
    pair,
    random_tensor,
    start,
    train,
)
from tests.simulation import bits, parameters_of, snapshot


def scaled_gradients(optimizer: Optimizer, scaler: GradScaler, step: int, *, bad: bool) -> None:
    """As a backward pass of a scaled loss leaves them; if `bad`, one has overflowed."""
    parameters = parameters_of(optimizer)
    made = gradients(parameters, step)
    total = torch.stack([(p * g).sum() for p, g in zip(parameters, made, strict=True)]).sum()
    optimizer.zero_grad()
    scaler.scale(total).backward()
    if bad:
        parameters[4].grad[0, 0] = torch.inf


@pytest.mark.parametrize("order", ["step", "unscale", "clip"])
@pytest.mark.parametrize("is_enabled", [True, False])
def test_grad_scaler(order: str, is_enabled: bool) -> None:
    """F3: SGD's parameters and scales, through overflows, unscaled and clipped before or not."""
    optimizers = pair(start(), UNCOMPRESSED, lr=0.1, momentum=0.9)
    options = {"init_scale": 2.0**12, "growth_interval": 3, "enabled": is_enabled}
    scalers = [GradScaler("cpu", **options) for _ in optimizers]
    scales = []
    for step in range(8):
        for optimizer, scaler in zip(optimizers, scalers, strict=True):
            scaled_gradients(optimizer, scaler, step, bad=is_enabled and step in (1, 4))
            if order != "step":
                scaler.unscale_(optimizer)
            if order == "clip":
                torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), 1.0)
            scaler.step(optimizer)
            scaler.update()
        assert_equal(*optimizers, step)
        assert scalers[0].get_scale() == scalers[1].get_scale()
        scales.append(scalers[0].get_scale())
    if is_enabled:
        assert {2.0**11, 2.0**12} <= set(scales)
        assert optimizers[0].communication_stats()["skipped_steps"] == 2


def test_a_skipped_step_leaves_no_trace() -> None:
    """F3: parameters, momenta, errors, factors and counters are what they were."""
    optimizer, _ = pair(start(), FORMS["paper"], lr=0.1, momentum=0.9)
    train([optimizer], range(2))
    scaler = GradScaler("cpu", init_scale=2.0**12)
    before = bits(snapshot([optimizer]))
    scaled_gradients(optimizer, scaler, 2, bad=True)
    scaler.step(optimizer)
    scaler.update()
    assert bits(snapshot([optimizer])) == before
    assert scaler.get_scale() == 2.0**11


def test_errors_are_in_units_of_the_loss() -> None:
    """F3: a scale that changes does not change what errors mean."""
    optimizer, twin = (pair(start(), FORMS["paper"], lr=0.1, momentum=0.9)[0] for _ in range(2))
    for step in range(4):
        scaler = GradScaler("cpu", init_scale=2.0 ** (4 + step))  # powers of two: exact
        scaled_gradients(optimizer, scaler, step, bad=False)
        scaler.step(optimizer)
        scaled_gradients(twin, GradScaler("cpu", enabled=False), step, bad=False)
        twin.step()
    assert bits(snapshot([optimizer])) == bits(snapshot([twin]))


def test_a_scaler_refuses_closures() -> None:
    """F4: as with every optimizer; and `step` has no parameter for a scaler."""
    scaler = GradScaler("cpu")
    optimizers = pair(start(), UNCOMPRESSED, lr=0.1)
    for optimizer in optimizers:
        scaled_gradients(optimizer, scaler, 0, bad=False)
        with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
            scaler.step(optimizer, closure=lambda: None)
    assert "grad_scaler" not in inspect.signature(optimizers[0].step).parameters


def test_without_a_scaler_nan_is_an_error() -> None:
    """F3: a scaler skips such a step whatever `nonfinite` says; without one that decides."""
    optimizer, _ = pair(start(), UNCOMPRESSED, lr=0.1)
    scaled_gradients(optimizer, GradScaler("cpu", enabled=False), 0, bad=True)
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()


def test_an_optimizer_in_the_backward_pass() -> None:
    """F5: torch's private way to have one for each parameter works with one worker."""
    with warnings.catch_warnings():  # torch's own, of torch.jit
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.distributed.optim import _apply_optimizer_in_backward
    models = [torch.nn.Linear(6, 5) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options: Any = {"lr": 0.1, "momentum": 0.9}
    for model, cls, extra in zip(models, (PowerSGDOptimizer, SGD), (UNCOMPRESSED, {}), strict=True):
        _apply_optimizer_in_backward(cls, model.parameters(), {**options, **extra})
    for step in range(3):
        inputs = random_tensor((4, 6), torch.float32, step)
        for model in models:
            model(inputs).square().mean().backward()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_frameworks_that_patch_step() -> None:
    """F6: a wrapper that counts calls and hands the closure on by position."""
    optimizer, _ = pair(start(), UNCOMPRESSED, lr=0.1)
    method, counts = optimizer.step, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts.append(len(args) + len(kwargs))
        return method(*args, **kwargs)

    optimizer.step = counted

    def training_step() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([p.square().sum() for p in parameters_of(optimizer)]).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(training_step).item() for _ in range(3)]
    assert counts == [1, 1, 1]
    assert losses == sorted(losses, reverse=True)


def test_frameworks_that_derive_classes() -> None:
    """F6: a class that is made of ours on the fly, and given the state of an instance."""
    optimizer, twin = (pair(start(), FULL_RANK, lr=0.1, momentum=0.9)[0] for _ in range(2))
    train([optimizer, twin], range(2))
    calls = []

    def step(self: Any, closure: Any = None) -> Any:
        calls.append(len(self.param_groups))
        return super(derived, self).step(closure)

    derived = type("Distributed", (type(optimizer),), {"step": step})
    optimizer.__class__ = derived
    train([optimizer, twin], range(2, 4))
    assert calls == [1, 1]
    assert bits(parameters_of(optimizer)) == bits(parameters_of(twin))


def test_compiling_a_step() -> None:
    """F7: torch.compile takes `optimizer.step`, and the numbers stay."""
    ps = [start(shapes=[(12, 10)])[0] for _ in range(2)]
    optimizer, twin = (PowerSGDOptimizer([p], lr=0.1, momentum=0.9, rank=1) for p in ps)
    assert not hasattr(optimizer, "_init_group")  # torch.compile would call it while it traces
    step = torch.compile(optimizer.step, backend="eager")
    try:
        for number in range(3):
            for each in (optimizer, twin):
                give(each, gradients(parameters_of(each), number))
            step()
            twin.step()
        assert bits(ps[0]) == bits(ps[1])
        assert bits(optimizer.state_dict()) == bits(twin.state_dict())
    finally:
        torch._dynamo.reset()


def test_nothing_is_called_capturable() -> None:
    """F8: a group with that name would have torch load "step" in another way."""
    assert "capturable" not in PowerSGDOptimizer(start(), lr=0.1).param_groups[0]
