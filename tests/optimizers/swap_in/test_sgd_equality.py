"""B4, B11, B12: the numbers are SGD's, for every combination of its arguments.

Nothing compressed they are SGD's bit by bit; compressed to full rank, to rounding. float16 is never
bitwise: updates of float16 parameters are kept in float32, since a sum of gradients and errors may
exceed what float16 holds. Nor is bfloat16 with the fused kernel, see `pair`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.optimizers.swap_in.pairs import (
    COMBINATIONS,
    FORMS,
    FULL_RANK,
    IMPLEMENTATIONS,
    UNCOMPRESSED,
    assert_close,
    assert_equal,
    give,
    gradients,
    pair,
    random_tensor,
    skip_unless_sgd_takes,
    start,
    train,
)
from tests.simulation import parameters_of
from tests.strategies import LAYOUTS, with_layout

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KERNELS = [(dtype, name) for dtype in DTYPES for name in IMPLEMENTATIONS]
LEARNING_RATES: dict[str, Any] = {
    "float": 0.05,
    "0-dim": torch.tensor(0.05),
    "1-dim": torch.tensor([0.05]),
}


@pytest.mark.parametrize("form", ["off", "full rank"])
@pytest.mark.parametrize("lr", LEARNING_RATES.values(), ids=[f"lr {k}" for k in LEARNING_RATES])
@pytest.mark.parametrize(("dtype", "implementation"), KERNELS, ids=str)
def test_every_combination(
    dtype: torch.dtype, implementation: str, lr: float | Tensor, form: str
) -> None:
    """B4: parameters and momenta of SGD to the bit, or to rounding, in all shapes (B11)."""
    skip_unless_sgd_takes(dtype, lr=lr, **IMPLEMENTATIONS[implementation])
    is_rounded = dtype == torch.float16 or (dtype, implementation) == (torch.bfloat16, "fused")
    check = assert_close if is_rounded or form == "full rank" else assert_equal
    for options in COMBINATIONS:
        own = {"lr": lr, **options, **IMPLEMENTATIONS[implementation]}
        optimizers = pair(start(dtype), FORMS[form], **own)
        train(optimizers, range(3))
        check(*optimizers, options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("implementation", ["default", "for-loop", "foreach"])
def test_layouts_of_gradients(layout: str, nesterov: bool, implementation: str) -> None:
    """B7: gradients need not have the strides of their parameters."""
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    for extra, check in ((UNCOMPRESSED, assert_equal), (FULL_RANK, assert_close)):
        optimizers = pair(start(), extra, **options, **IMPLEMENTATIONS[implementation])
        for step in range(3):
            for optimizer in optimizers:
                parameters = parameters_of(optimizer)
                for p, g in zip(parameters, gradients(parameters, step), strict=True):
                    p.grad = with_layout(g, layout)
                # With expanded gradients and foreach+nesterov SGD itself fails: it writes to them.
                is_theirs = optimizer is optimizers[1]
                if is_theirs and layout == "expanded":
                    give(optimizer, [p.grad.contiguous() for p in parameters])
                optimizer.step()
        check(*optimizers)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_layouts_of_parameters(layout: str) -> None:
    """B7, B9: parameters of any strides."""
    parameters = [with_layout(p.detach(), layout).requires_grad_() for p in start()]
    for options in COMBINATIONS:
        optimizers = pair(parameters, UNCOMPRESSED, lr=0.05, **options)
        train(optimizers, range(3))
        assert_equal(*optimizers, options)


def test_tied_parameters() -> None:
    """B11: a parameter that a model uses twice has one gradient, the sum."""
    inputs = random_tensor((7, 6), torch.float64, 3)

    def loss(weight: Tensor) -> Tensor:
        return ((inputs @ weight).relu() @ weight.T - inputs).square().mean()

    optimizers = pair(start(torch.float64, [(6, 6)]), UNCOMPRESSED, lr=0.1, momentum=0.9)
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.zero_grad()
            loss(parameters_of(optimizer)[0]).backward()
            optimizer.step()
    assert_equal(*optimizers)


@pytest.mark.parametrize("implementation", ["default", "for-loop", "foreach"])
def test_several_dtypes_in_one_optimizer(implementation: str) -> None:
    """B12: each parameter is updated in its own dtype."""
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float32, torch.float64]
    parameters = [start(dtype, [(12, 10)])[0] for dtype in dtypes]
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    own = IMPLEMENTATIONS[implementation]
    for extra, check in ((UNCOMPRESSED, assert_equal), (FULL_RANK, assert_close)):
        optimizers = pair(parameters, extra, **options, **own)
        train(optimizers, range(4))
        check(*optimizers)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_no_gradient_and_late_gradients(dtype: torch.dtype) -> None:
    """B2, B4: None leaves a parameter, its momentum and its decay alone; a zero does not."""
    for options in COMBINATIONS:
        for implementation in ("default", "for-loop", "foreach"):
            own = {**options, **IMPLEMENTATIONS[implementation]}
            optimizers = pair(start(dtype), UNCOMPRESSED, lr=0.05, **own)
            for step in range(5):
                for optimizer in optimizers:
                    given: list[Tensor | None] = list(gradients(parameters_of(optimizer), step))
                    given[4] = None if step in (0, 2) else given[4]  # begins late, and pauses
                    given[5] = None if step == 3 else torch.zeros_like(given[5])
                    give(optimizer, given)
                    before = parameters_of(optimizer)[4].detach().clone()
                    optimizer.step()
                    assert (given[4] is None) == torch.equal(before, parameters_of(optimizer)[4])
            assert_equal(*optimizers, own)
