"""A: how an optimizer is made."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contract.adapters import Adapter
from benchmarks.contract.made import Given, given, join, noise, require_equal_workers, values
from benchmarks.contract.questions import describe_error, require, row

__all__: list[str] = []


def matrix(seed: int = 0) -> nn.Parameter:
    return nn.Parameter(values([(12, 10)], seed)[0])


@row(
    "A1",
    "SGD's arguments, in SGD's order",
    "Names, kinds and defaults of SGD's arguments come first in the signature.",
)
def arguments(adapter: Adapter) -> None:
    adapter.needs_sgd()
    expected = inspect.signature(torch.optim.SGD).parameters
    found = inspect.signature(adapter.optimizer_class).parameters
    for wanted, own in zip(expected.values(), list(found.values())[: len(expected)], strict=True):
        require(wanted == own or wanted.replace(annotation=own.annotation) == own, str(own))


BAD_SETTINGS: list[dict[str, Any]] = [
    {"lr": -1.0},
    {"weight_decay": -0.1},
    {"lr": torch.tensor([0.1, 0.2])},
    {"momentum": -0.1},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
    {"fused": True, "differentiable": True},
    {"fused": True, "foreach": True},
]


@row(
    "A2",
    "Settings out of range: SGD's errors",
    "Eight wrong settings raise what SGD raises, with the same words; of what is not SGD, two: "
    "a negative lr and a negative weight_decay.",
)
def bad_settings(adapter: Adapter) -> str | None:
    cases = BAD_SETTINGS if adapter.is_sgd else BAD_SETTINGS[:2]
    for settings in cases:
        expected = error_of(lambda s=settings: torch.optim.SGD([matrix()], **s))
        found = error_of(lambda s=settings: adapter.optimizer([matrix()], **s))
        require(found == expected, f"{settings}: {found or 'no error'}, not {expected}")
    return None if adapter.is_sgd else "for lr and weight_decay"


def error_of(action: Callable[[], object]) -> str | None:
    """What it raises or warns of; None if nothing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            action()
    except Exception as error:
        return describe_error(error)
    return None


def bad_params() -> list[Any]:
    one, two = matrix(), matrix(1)
    return [
        [],
        one,
        [1],
        [one * 2],
        [{"params": {one, two}}],
        [{"params": [one]}, {"params": [one]}],
        [("one", one), two],
        [{"params": [("one", one)]}, {"params": [two]}],
        [one, one],
    ]


@row(
    "A3",
    "Wrong parameters: the errors of `Optimizer`",
    "No parameters, a bare tensor, a number, a non-leaf, a set, a parameter in two groups, names "
    "for some only, and a parameter that is listed twice: errors and warnings are SGD's.",
)
def wrong_params(adapter: Adapter) -> None:
    for number in range(len(bad_params())):
        expected = error_of(lambda n=number: torch.optim.SGD(bad_params()[n]))
        found = error_of(lambda n=number: adapter.optimizer(bad_params()[n]))
        require(found == expected, f"{found or 'no error'}, not {expected}")


@row(
    "A4",
    "Generators, groups, named parameters, a single tensor as group",
    "A step with each of these forms of `params` moves every parameter.",
)
def forms_of_params(adapter: Adapter) -> None:
    forms: dict[str, Callable[[nn.Module], Any]] = {
        "a generator": lambda model: (p for p in model.parameters()),
        "groups": lambda model: [{"params": [p], "lr": 0.2} for p in model.parameters()],
        "named parameters": lambda model: model.named_parameters(),
        "a single tensor": lambda model: [{"params": p} for p in model.parameters()],
    }
    for form, params_of in forms.items():
        model = given((12, 10), (9, 14))
        before = [p.detach().clone() for p in model.parameters()]
        loop = adapter.loop(model, params_of(model))
        loop.train(noise(model, 0))
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        require(all(moved), f"{form}: a parameter did not move")


@row(
    "A5",
    "Without a process group, or made before it",
    "A step without torch.distributed; then the group is initialized, and the workers of the same "
    "optimizer agree.",
    workers=2,
    has_group=False,
)
def late_group(adapter: Adapter) -> None:
    model = given((12, 10), (9, 14))
    torch.manual_seed(0)
    loop = adapter.loop(model)
    loop.train(noise(model, 0))
    join()
    for step in range(1, 5):
        loop.train(noise(model, step, torch.distributed.get_rank()))
        require_equal_workers(model, f"{step} step(s) after there was a group")


@row(
    "A6",
    "Frozen parameters and integer tensors are left alone",
    "They are among the parameters, without gradients; three steps.",
)
def frozen(adapter: Adapter) -> None:
    matrices: list[Tensor] = values([(12, 10), (12, 10)])
    model = Given([*matrices, torch.arange(6).view(2, 3)])
    model.weights[1].requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    loop = adapter.loop(model)
    for step in range(3):
        loop.train(noise(model, step))
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    require(moved == [True, False, False], "what has no gradient was changed")
