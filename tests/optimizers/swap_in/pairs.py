"""Ours beside torch.optim.SGD: made alike, given the same gradients, compared."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from efsgd import PowerSGDOptimizer
from tests.simulation import difference, parameters_of
from tests.strategies import gaussian

#: Nothing compressed: the same numbers as SGD, bit by bit.
UNCOMPRESSED = {"momentum_form": "sgd", "min_compression_rate": math.inf}
#: Everything that is a matrix compressed, to a rank at which nothing is lost but rounding.
FULL_RANK = {"momentum_form": "sgd", "min_compression_rate": 0.0, "rank": 99}
#: Ways to compress.
FORMS: dict[str, dict[str, Any]] = {
    "off": UNCOMPRESSED,
    "full rank": FULL_RANK,
    "rank 1": {**FULL_RANK, "rank": 1},
    "paper": {"rank": 1, "min_compression_rate": 0.0},
}
#: A scalar, empty ones, a vector, and tensors of two to five dimensions.
SHAPES = [(), (0,), (0, 3), (5,), (12, 10), (4, 3, 3), (4, 3, 2, 2), (3, 2, 2, 1, 2)]

_GRID = itertools.product((0.0, 0.9), (0.0, 0.3), (0.0, 0.1), (False, True), (False, True))
#: SGD's arguments in every combination that it accepts.
COMBINATIONS = [
    {
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    for momentum, dampening, weight_decay, nesterov, maximize in _GRID
    if not nesterov or (momentum and not dampening)
]
#: The ways in which many tensors may be updated.
IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
#: What full rank loses in a few steps: products with orthonormal columns round to some ten units in
#: the last place; and what SGD computes in 16 bits, ours computes in 32, which a parameter that
#: comes near zero shows as much as a few units more.
ROUNDING = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.bfloat16: 0.03,
    torch.float16: 0.01,
    torch.complex128: 1e-13,
    torch.complex64: 1e-5,
}


def random_tensor(shape: Sequence[int], dtype: torch.dtype, *seed: int) -> Tensor:
    """Standard normal; both parts of it where `dtype` is complex."""
    if dtype.is_complex:
        parts = [gaussian(tuple(shape), *seed, part) for part in range(2)]
        return torch.complex(*parts).to(dtype)
    return gaussian(tuple(shape), *seed).to(dtype)


def start(
    dtype: torch.dtype = torch.float32, shapes: Sequence[Sequence[int]] = SHAPES
) -> list[Tensor]:
    """Initial parameters."""
    return [random_tensor(shape, dtype, 1, i).requires_grad_() for i, shape in enumerate(shapes)]


def gradients(like: Iterable[Tensor], step: int) -> list[Tensor]:
    """Of one step, new tensors at every call."""
    return [random_tensor(p.shape, p.dtype, 2, step, i) for i, p in enumerate(like)]


def pair(
    parameters: Sequence[Tensor], extra: dict[str, Any], **options: Any
) -> tuple[PowerSGDOptimizer, SGD]:
    """Ours and SGD, each with its own copies of the parameters, in their memory formats.

    `extra` are arguments of ours alone; tensors among `options` are copied for each.

    On a CPU the fused kernel of torch 2.13 leaves whole vectors of 16-bit tensors unchanged
    (pytorch issue 191763). What is right there is SGD's for-loop.
    """
    made = []
    has_halves = any(p.element_size() == 2 and p.is_cpu for p in parameters)
    sgd_only = {"fused": None} if options.get("fused") and has_halves else {}
    for cls, more in ((PowerSGDOptimizer, extra), (SGD, sgd_only)):
        own = [p.detach().clone().requires_grad_(p.requires_grad) for p in parameters]
        copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in options.items()}
        made.append(cls(own, **{**copies, **more}))
    return made[0], made[1]


def give(optimizer: Optimizer, given: Iterable[Tensor | None]) -> None:
    """Sets gradients, copied in their layouts."""
    for parameter, gradient in zip(parameters_of(optimizer), given, strict=True):
        parameter.grad = None if gradient is None else gradient.clone()


def train(
    optimizers: Iterable[Optimizer], steps: Iterable[int], schedulers: Iterable[Any] = ()
) -> None:
    """Steps optimizers with the same gradients, then their schedulers."""
    schedulers = list(schedulers)
    for optimizer in optimizers:
        for step in steps:
            give(optimizer, gradients(parameters_of(optimizer), step))
            optimizer.step()
            for scheduler in schedulers:
                if scheduler.optimizer is optimizer:
                    scheduler.step()


def skip_unless_sgd_takes(dtype: torch.dtype = torch.float32, **options: Any) -> None:
    """Skips the test if SGD itself, of the torch that is installed, cannot step with `options`."""
    _, theirs = pair([torch.zeros(2, dtype=dtype)], UNCOMPRESSED, **options)
    try:
        train([theirs], range(1))
    except TypeError as error:
        reason = str(error).partition("\n")[0]
        pytest.skip(f"this torch's SGD takes no step with {options}: {reason}")


def momenta_of(optimizer: Optimizer) -> list[Tensor | None]:
    """Of each parameter."""
    return [optimizer.state[p].get("momentum_buffer") for p in parameters_of(optimizer)]


def assert_equal(ours: Optimizer, theirs: Optimizer, context: object = "") -> None:
    """Parameters and momenta are bitwise equal."""
    for index, (mine, other) in enumerate(
        zip(parameters_of(ours), parameters_of(theirs), strict=True)
    ):
        assert torch.equal(mine, other), (index, context)
        momentum, expected = (o.state[p].get("momentum_buffer")
                              for o, p in ((ours, mine), (theirs, other)))  # fmt: skip
        if expected is not None:
            assert momentum is not None, (index, context)
            assert torch.equal(momentum, expected), (index, context)


def assert_close(ours: Optimizer, theirs: Optimizer, context: object = "") -> None:
    """Parameters are equal to rounding."""
    for index, (mine, other) in enumerate(
        zip(parameters_of(ours), parameters_of(theirs), strict=True)
    ):
        a, b = (torch.view_as_real(p) if p.is_complex() else p for p in (mine, other))
        assert difference(a, b) <= ROUNDING[mine.dtype], (index, context)
