"""G3: differentiable=True, with one worker and nothing compressed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from efsgd import PowerSGDOptimizer
from efsgd.testing import step_together
from tests.optimizers.swap_in.pairs import UNCOMPRESSED, random_tensor, skip_unless_sgd_takes

FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "maximize": {"momentum": 0.9, "maximize": True},
}


def numbers(*shape: int, seed: int) -> Tensor:
    return random_tensor(shape, torch.float64, seed).requires_grad_()


def skip_unless_settings_are_differentiated() -> None:
    learned = {"lr": setting(0.1), "weight_decay": setting(0.1)}
    skip_unless_sgd_takes(torch.float64, differentiable=True, **learned)


def one_step(
    cls: type, p: Tensor, grad: Tensor, buffer: Tensor, lr: Any, decay: Any, **options: Any
) -> tuple[Tensor, ...]:
    """From all that goes into a step to all that comes out of it."""
    p, buffer = p.clone(), buffer.clone()
    p.grad = grad if cls is PowerSGDOptimizer else grad.clone()  # torch's own SGD writes to it
    optimizer = cls([p], lr=lr, weight_decay=decay, differentiable=True, **options)
    if options.get("momentum"):
        optimizer.state[p]["momentum_buffer"] = buffer
        if cls is PowerSGDOptimizer:
            optimizer.state[p]["momentum_started"] = torch.tensor(True)
    optimizer.step()
    ends = [optimizer.state[p]["momentum_buffer"]] if options.get("momentum") else []
    return p, *ends


def arguments() -> list[Tensor]:
    tensors = [numbers(4, 3, seed=seed) for seed in range(3)]
    return [*tensors, setting(0.1), setting(0.05)]


def setting(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


# Older torch's SGD is differentiated by tensors alone, with settings that are numbers.
@pytest.mark.parametrize("settings", ["learned", "fixed"])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("form", ["sgd", "paper"])
def test_derivatives(form: str, flags: str, settings: str) -> None:
    """G3: through parameters, gradients, momenta, lr and weight decay, against differences.

    Gradients are not written to (B7).
    """
    fixed = [0.1, 0.05] if settings == "fixed" else []
    if form == "sgd" and not fixed:
        skip_unless_settings_are_differentiated()
    options = {**FLAGS[flags], "momentum_form": form, "min_compression_rate": math.inf}
    if form == "paper" and options.keys() & {"nesterov", "dampening"}:
        options.pop("nesterov", None)
        options.pop("dampening", None)

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        return one_step(PowerSGDOptimizer, *given, *fixed, **options)

    given = arguments()[: 5 - len(fixed)]
    before = given[1].detach().clone()
    assert torch.autograd.gradcheck(function, given)
    assert torch.equal(given[1], before)


@pytest.mark.parametrize("settings", ["learned", "fixed"])
@pytest.mark.parametrize("flags", FLAGS)
def test_numbers_of_sgd(flags: str, settings: str) -> None:
    """G3: values are SGD's bit by bit, and derivatives to rounding."""
    fixed = [0.1] if settings == "fixed" else []
    if not fixed:
        skip_unless_settings_are_differentiated()
    results = []
    for cls, extra in ((PowerSGDOptimizer, UNCOMPRESSED), (SGD, {})):
        given = arguments()[: 4 - len(fixed)]
        ends = one_step(cls, *given, *fixed, 0.05, **FLAGS[flags], **extra)
        loss = torch.stack([end.square().sum() for end in ends]).sum()
        found = torch.autograd.grad(loss, given, allow_unused=True)
        results.append((ends, found))
    (ours, our_slopes), (theirs, their_slopes) = results
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(our_slopes, their_slopes, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-12, atol=1e-12)  # float64, another order


def test_a_learning_rate_is_learned() -> None:
    """G3: over several steps, whose gradients are themselves differentiated."""
    skip_unless_settings_are_differentiated()
    slopes = []
    for cls, extra in ((PowerSGDOptimizer, UNCOMPRESSED), (SGD, {})):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        x = numbers(5, seed=4).clone()
        optimizer = cls([x], lr=lr, differentiable=True, **extra)
        for _ in range(3):
            y = x.clone()  # x is updated in place
            (x.grad,) = torch.autograd.grad((y**4).sum(), [y], create_graph=True)
            optimizer.step()
        slopes.append(torch.autograd.grad((x**4).sum(), lr)[0])
    assert torch.allclose(*slopes, rtol=1e-12, atol=0.0)  # float64, another order
    assert slopes[0] < 0


@pytest.mark.parametrize("extra", [{}, {"min_compression_rate": 0.0}], ids=str)
def test_compression_is_not_differentiable(extra: dict[str, Any]) -> None:
    """G3: said with what to do, and nothing has changed."""
    p = torch.zeros(12, 10, requires_grad=True)
    p.grad = torch.ones_like(p)
    words = r"parameter 0, shape \[12, 10\], is compressed.*min_compression_rate=math\.inf"
    with pytest.raises(NotImplementedError, match=words):
        PowerSGDOptimizer([p], differentiable=True, rank=2, **extra).step()
    assert not p.any()


def test_communication_is_not_differentiable() -> None:
    """G3: several workers are told so, all of them, and nothing has changed."""
    ps = [torch.zeros(4, 3, requires_grad=True) for _ in range(2)]
    optimizers = [PowerSGDOptimizer([p], differentiable=True, **UNCOMPRESSED) for p in ps]
    for p in ps:
        p.grad = torch.ones_like(p)
    with pytest.raises(NotImplementedError, match="differentiable") as caught:
        step_together(optimizers)
    assert any(str(caught.value) in note for note in caught.value.__notes__)
    assert not any(p.any() for p in ps)
