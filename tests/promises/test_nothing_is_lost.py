"""Promise 2, conservation: Σ_t Δ'_t + mean_w e_w(T) = Σ_t mean_w g_w(t)."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd import PowerSGDOptimizer
from efsgd.checkpoint import consolidation
from efsgd.testing import lockstep
from tests.simulation import errors_of, make_workers, parameters_of, replicated, step_with, train
from tests.strategies import Gradients, Scenario, examples, scenarios

LR = 0.5
# What is lost to rounding in float64: 2e-16 for each of some dozen sums.
TOLERANCE = 1e-10

PLAIN = {"lr": LR, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}


class Balance:
    """Books what goes into a group of workers and what comes out."""

    def __init__(self, workers: Sequence[PowerSGDOptimizer]) -> None:
        self.start = [p.detach().clone() for p in parameters_of(workers[0])]
        self.received = [torch.zeros_like(p) for p in self.start]
        self.scale = [torch.ones(()) for _ in self.start]

    def receive(self, gradients: Gradients) -> None:
        """Gradients that every worker was given in one step."""
        for index, total in enumerate(self.received):
            for own in gradients:
                gradient = own[index]
                if gradient is not None:
                    total += gradient / len(gradients)
                    self.scale[index] = self.scale[index] + gradient.abs().sum()

    def step(self, workers: Sequence[PowerSGDOptimizer], gradients: Gradients) -> None:
        """One step of all workers, after which nothing must be lost."""
        step_with(workers, gradients)
        self.receive(gradients)
        self.check(workers)

    def check(self, workers: Sequence[PowerSGDOptimizer]) -> None:
        """With `momentum_form="sgd"` and no momentum, x(0) - x(T) = lr Σ Δ'."""
        errors = [torch.stack(each).mean(0) for each in zip(*map(errors_of, workers), strict=True)]
        for index, parameter in enumerate(parameters_of(workers[0])):
            applied = (self.start[index] - parameter.detach()) / LR
            lost = applied + errors[index] - self.received[index]
            assert lost.numel() == 0 or lost.abs().max() <= TOLERANCE * self.scale[index]


@examples(200)
@given(scenarios(**PLAIN, momentum_form="sgd", maximize=False, error_feedback=True))
def test_conservation(scenario: Scenario) -> None:
    workers = make_workers(scenario.parameters(), scenario.world_size, **scenario.hyperparameters)
    balance = Balance(workers)
    for step in range(scenario.steps):
        balance.step(workers, scenario.gradients(step))


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "rank": st.integers(1, 7),
        "min_compression_rate": st.sampled_from([0.0, 0.5, 1.0, 2.0, float("inf")]),
    },
)
MANY_STEPS = 12


@examples(100)
@given(
    scenarios(**PLAIN, momentum_form="sgd", maximize=False, error_feedback=True,
              min_steps=6, max_steps=MANY_STEPS),
    st.lists(st.integers(1, 4), max_size=2),
    # Before each step, for each group: the settings that are changed.
    st.lists(st.tuples(CHANGES, CHANGES, CHANGES), min_size=MANY_STEPS, max_size=MANY_STEPS),
)  # fmt: skip
def test_conservation_through_changes_of_any_group_before_any_step(
    scenario: Scenario, cuts: list[int], changes: list[tuple[dict[str, Any], ...]]
) -> None:
    workers = make_workers(
        scenario.parameters(), scenario.world_size, cuts, **scenario.hyperparameters
    )
    balance = Balance(workers)
    for step in range(scenario.steps):
        for optimizer in workers:
            for group, change in zip(optimizer.param_groups, changes[step], strict=False):
                group.update(change)
        balance.step(workers, scenario.gradients(step))
        first = replicated(workers[0])
        assert all(replicated(optimizer) == first for optimizer in workers[1:])


def a_run(world_size: int = 4, **options: object) -> tuple[list[PowerSGDOptimizer], Scenario]:
    shapes = [(12, 10), (10,), (12, 10), (3, 4, 2, 2)]
    own = {"lr": LR, "momentum_form": "sgd", "rank": 2, **options}
    scenario = Scenario(shapes, world_size, own, 9, 7)
    return make_workers(scenario.parameters(), world_size, **own), scenario


def test_what_was_left_is_sent_when_compression_ends() -> None:
    workers, scenario = a_run()
    train(scenario, range(3), workers)
    assert all(errors_of(optimizer)[0].abs().max() > 0 for optimizer in workers)
    for optimizer in workers:
        optimizer.param_groups[0]["min_compression_rate"] = float("inf")
    step_with(workers, scenario.gradients(3))
    assert all(error.abs().sum() == 0 for optimizer in workers for error in errors_of(optimizer))


@pytest.mark.parametrize("new_world_size", [1, 2, 4, 8])
def test_conservation_through_a_checkpoint_and_other_numbers_of_workers(
    new_world_size: int,
) -> None:
    workers, scenario = a_run()
    balance = Balance(workers)
    for step in range(4):
        balance.step(workers, scenario.gradients(step))
    saved = lockstep([consolidation(optimizer) for optimizer in workers]).results
    values: list[Tensor] = parameters_of(workers[0])
    workers = make_workers(values, new_world_size, lr=LR)
    for optimizer in workers:
        optimizer.load_state_dict(copy.deepcopy(saved[0]))
    balance.check(workers)
    other = Scenario(scenario.shapes, new_world_size, {}, 4, 8, scenario.kinds, scenario.layouts)
    for step in range(4):
        balance.step(workers, other.gradients(step))


def test_a_gradient_that_comes_back_finds_its_error_again() -> None:
    workers, scenario = a_run()
    balance = Balance(workers)
    for step in range(6):
        gradients = scenario.gradients(step)
        if step in (2, 3):  # nobody has a gradient for the first matrix, one worker for the third
            gradients = [
                [None, own[1], own[2] if worker == 1 else None, own[3]]
                for worker, own in enumerate(gradients)
            ]
            before = [error[0].clone() for error in map(errors_of, workers)]
        balance.step(workers, gradients)
        if step in (2, 3):
            after = [error[0] for error in map(errors_of, workers)]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
