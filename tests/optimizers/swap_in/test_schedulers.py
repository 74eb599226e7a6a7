"""F1, F2: every learning-rate scheduler of torch, in lockstep with SGD, bit by bit."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from tests.optimizers.swap_in.pairs import UNCOMPRESSED, assert_equal, give, gradients, pair, start
from tests.simulation import parameters_of

STEPS = 12


def chained(optimizer: Optimizer) -> Any:
    first = lr_scheduler.StepLR(optimizer, step_size=3)
    return lr_scheduler.ChainedScheduler([first, lr_scheduler.ExponentialLR(optimizer, 0.9)])


def sequential(optimizer: Optimizer) -> Any:
    first = lr_scheduler.ConstantLR(optimizer, factor=0.1, total_iters=3)
    second = lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
    return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[4])


CASES: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.95**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=3),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 9]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.3, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.8),
    "SequentialLR": sequential,
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=7, eta_min=1e-3),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=STEPS + 1),
    "SWALR": lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=5),
}
#: They change the momentum along with the learning rate.
CYCLING = {"CyclicLR", "OneCycleLR"}


def advance(optimizer: Optimizer, scheduler: Any, step: int) -> None:
    """One step of both; the scheduler that looks at the loss sees one that stops falling."""
    give(optimizer, gradients(parameters_of(optimizer), step))
    optimizer.step()
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(max(1.0, 3.0 - step))
    else:
        scheduler.step()


def test_no_scheduler_is_missing() -> None:
    """F2: all that torch.optim.lr_scheduler has."""
    public = {
        name
        for name, cls in vars(lr_scheduler).items()
        if inspect.isclass(cls) and issubclass(cls, LRScheduler) and not name.startswith("_")
    }
    missing = public - {"LRScheduler"} - CASES.keys()
    assert not missing, f"add a case to CASES for each of {sorted(missing)}"


def settings_of(optimizer: Optimizer) -> list[tuple[float, float]]:
    return [(float(group["lr"]), group["momentum"]) for group in optimizer.param_groups]


@pytest.mark.parametrize("is_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", CASES)
def test_scheduler(name: str, is_tensor: bool) -> None:
    """F1, F2: SGD to the bit, with lr a float or a tensor; and the schedule is applied."""
    lr: Any = torch.tensor(0.1) if is_tensor else 0.1
    optimizers = pair(start(), UNCOMPRESSED, lr=lr, momentum=0.9, nesterov=True)
    lrs = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    schedulers = [CASES[name](optimizer) for optimizer in optimizers]
    seen = []
    for step in range(STEPS):
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            advance(optimizer, scheduler, step)
        assert_equal(*optimizers, step)
        assert settings_of(optimizers[0]) == settings_of(optimizers[1])
        seen.append(settings_of(optimizers[0])[0])
    assert len({lr for lr, _ in seen}) > 1
    assert (len({momentum for _, momentum in seen}) > 1) == (name in CYCLING)
    if is_tensor:  # older torch puts a number in its place where newer torch fills it
        kept = [o.param_groups[0]["lr"] is t for o, t in zip(optimizers, lrs, strict=True)]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"LambdaLR", "MultiplicativeLR"}))
def test_scheduler_resumes(name: str) -> None:
    """F2: state_dicts of optimizer and scheduler, loaded together, continue both."""
    optimizer, _ = pair(start(), UNCOMPRESSED, lr=0.1, momentum=0.9)
    scheduler = CASES[name](optimizer)
    for step in range(5):
        advance(optimizer, scheduler, step)
    again, _ = pair(parameters_of(optimizer), UNCOMPRESSED, lr=0.1, momentum=0.9)
    other = CASES[name](again)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    for step in range(5, STEPS):
        for each, own in ((optimizer, scheduler), (again, other)):
            advance(each, own, step)
        assert_equal(again, optimizer, step)
        assert settings_of(again) == settings_of(optimizer)


def test_groups_have_schedules_of_their_own() -> None:
    """F2: one function for each group."""
    optimizers = []
    for made in pair(start(), UNCOMPRESSED, lr=0.1, momentum=0.9):
        made.add_param_group({"params": start(shapes=[(6, 5)]), "lr": 0.3})
        optimizers.append(made)
    schedules = [
        lr_scheduler.LambdaLR(o, [lambda epoch: 0.9**epoch, lambda epoch: 1 / (1 + epoch)])
        for o in optimizers
    ]
    for step in range(4):
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            advance(optimizer, schedule, step)
        assert_equal(*optimizers)
