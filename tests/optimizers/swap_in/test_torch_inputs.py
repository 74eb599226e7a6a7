"""B4, A2, F2: torch's own material for testing optimizers, the part that is about SGD.

torch.testing._internal.common_optimizers says with which arguments, errors and schedulers torch
tests SGD. Ours is driven with the same. It needs expecttest, which is one of the tests' extra.
"""

from typing import Any

import pytest
import torch
from torch.optim import SGD

from efsgd import PowerSGDOptimizer
from tests.optimizers.swap_in.pairs import (
    FULL_RANK,
    IMPLEMENTATIONS,
    UNCOMPRESSED,
    assert_close,
    assert_equal,
    pair,
    random_tensor,
    start,
    train,
)
from tests.simulation import bits, parameters_of, snapshot

pytest.importorskip("expecttest", reason="torch's test material needs it: pip install .[test]")
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

INFO = next(info for info in optim_db if info.optim_cls is SGD)
INPUTS = {each.desc: each.kwargs for each in INFO.optim_inputs_func(device="cpu")}
ERRORS = {
    each.optimizer_error_input.desc: each
    for each in INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)
}
FORMS = {"off": (UNCOMPRESSED, assert_equal), "full rank": (FULL_RANK, assert_close)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("description", INPUTS)
def test_inputs(description: str, implementation: str, form: str) -> None:
    """B4: all arguments with which torch tests SGD."""
    extra, check = FORMS[form]
    options = {**INPUTS[description], **IMPLEMENTATIONS[implementation]}
    optimizers = pair(start(), extra, **options)
    train(optimizers, range(5))
    check(*optimizers)


@pytest.mark.parametrize("description", ERRORS)
def test_errors(description: str) -> None:
    """A2, A3: all errors that torch expects of SGD."""
    case = ERRORS[description]
    given = case.optimizer_error_input
    params = [torch.ones(2, 2, requires_grad=True)] if given.params is None else given.params
    assert case.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            PowerSGDOptimizer(params, **given.kwargs)
    else:
        with pytest.raises(case.error_type, match=case.error_regex):
            PowerSGDOptimizer(params, **given.kwargs)


def quadratic(p: torch.Tensor) -> torch.Tensor:
    """A convex function with its minimum elsewhere, the same at every call."""
    return (p - random_tensor(p.shape, p.dtype, 9)).square().mean()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", range(len(INFO.scheduler_inputs)))
def test_schedulers(number: int, form: str) -> None:
    """F2: with the schedulers with which torch tests SGD, several at once; and losses fall."""
    extra, check = FORMS[form]
    optimizers = pair(start(shapes=[(10, 5), (10,)]), extra, lr=0.1, momentum=0.9)
    schedulers = [[make(o) for make in INFO.scheduler_inputs[number]] for o in optimizers]
    losses: list[float] = []
    for _ in range(20):
        for optimizer, own in zip(optimizers, schedulers, strict=True):
            optimizer.zero_grad()
            loss = torch.stack([quadratic(p) for p in parameters_of(optimizer)]).sum()
            loss.backward()
            optimizer.step()
            for scheduler in own:
                is_plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([loss.item()] if is_plateau else []))
        losses.append(loss.item())
        check(*optimizers)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("description", INPUTS)
def test_round_trip(description: str, form: str) -> None:
    """D2, D7: a saved state_dict continues with every one of these arguments."""
    extra, _ = FORMS[form]
    kwargs: dict[str, Any] = INPUTS[description]
    optimizer, _ = pair(start(), extra, **kwargs)
    train([optimizer], range(3))
    again, _ = pair(parameters_of(optimizer), {}, lr=5.0)
    again.load_state_dict(optimizer.state_dict())
    train([optimizer, again], range(3, 6))
    assert bits(snapshot([again])) == bits(snapshot([optimizer]))
