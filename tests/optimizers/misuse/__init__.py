"""A table of what users may do wrong, and what every row of it is held to."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from efsgd import PowerSGDOptimizer
from efsgd.testing import step_together
from tests.simulation import (
    a_run,
    bits,
    copied,
    parameters_of,
    set_gradients,
    snapshot,
    step_with,
    train,
)
from tests.strategies import Scenario

__all__ = ["Case", "Run", "a_parameter", "ids", "invalid", "usual"]


@dataclass(frozen=True)
class Case:
    """One way to misuse an optimizer: `act` does it, with what `Run` offers.

    It must raise this very `error`, whose message says what was `given`, and the `remedy`.
    """

    name: str
    act: Callable[..., object]
    error: type[Exception]
    given: str
    remedy: str

    def check(self, *arguments: Any) -> pytest.ExceptionInfo[Exception]:
        """Runs `act`: it must raise this error, with these words."""
        with pytest.raises(self.error) as caught:
            self.act(*arguments)
        assert type(caught.value) is self.error
        text = str(caught.value)
        assert self.given in text, text
        assert self.remedy in text, text
        return caught


class Run:
    """Some workers in the middle of training, which must come out of a misuse as they went in."""

    def __init__(self, world_size: int = 1, *, steps: int = 2, **options: Any) -> None:
        self.workers, self.scenario = self._trained(world_size, steps, options)
        self.twins, _ = self._trained(world_size, steps, options)
        self._steps = steps

    @staticmethod
    def _trained(
        world_size: int, steps: int, options: dict[str, Any]
    ) -> tuple[list[PowerSGDOptimizer], Scenario]:
        workers, scenario = a_run(world_size, **options)
        train(scenario, range(steps), workers)
        return workers, scenario

    @property
    def optimizer(self) -> PowerSGDOptimizer:
        """The one that is misused: worker 1's where there are several."""
        return self.workers[-1 if len(self.workers) == 1 else 1]

    def step_after(self, edit: Callable[[PowerSGDOptimizer], object]) -> None:
        """Steps all workers after an edit of the optimizer, which is undone afterwards."""
        set_gradients(self.workers, self.scenario.gradients(self._steps))
        with restored(self.optimizer):
            edit(self.optimizer)
            step_together(self.workers)

    def assert_unchanged(self) -> None:
        """Parameters and all state are bitwise those of workers that were not misused."""
        assert bits(snapshot(self.workers)) == bits(snapshot(self.twins))

    def assert_goes_on(self) -> None:
        """Nor is anything else wrong: the next steps are theirs, too."""
        for step in range(self._steps, self._steps + 2):
            for workers in (self.workers, self.twins):
                step_with(workers, self.scenario.gradients(step))
        self.assert_unchanged()


@contextlib.contextmanager
def restored(optimizer: PowerSGDOptimizer) -> Iterator[None]:
    """Undoes what is done to the dicts of an optimizer, and to attributes of its parameters."""
    dicts = [*optimizer.param_groups, *optimizer.state.values()]
    kept = [dict(each) for each in dicts]
    parameters = [(p, p.data, p.requires_grad) for p in parameters_of(optimizer)]
    try:
        yield
    finally:
        for each, before in zip(dicts, kept, strict=True):
            each.clear()
            each.update(before)
        for p, data, requires_grad in parameters:
            p.grad, p.data, p.requires_grad = None, data, requires_grad


def invalid(name: str, value: Any, remedy: str, act: Callable[..., object], error: type) -> Case:
    """A case whose message begins as usual: "Invalid name: value. Must be ..."."""
    return Case(f"{name}={value!r}", act, error, f"Invalid {name}: {value!r}", remedy)


def ids(cases: Sequence[Case]) -> list[Any]:
    """The cases as parameters of a test, each of which has a name of its own."""
    assert len({case.name for case in cases}) == len(cases)
    return [pytest.param(case, id=case.name.replace(" ", "-")) for case in cases]


def a_parameter() -> torch.Tensor:
    """A matrix that is worth compressing."""
    return torch.ones(12, 10, requires_grad=True)


def usual() -> list[torch.Tensor]:
    """The parameters of a run: two matrices, and a vector between them."""
    return copied(parameters_of(a_run(1)[0][0]))
