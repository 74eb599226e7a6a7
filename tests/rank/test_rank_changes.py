"""Settings of single parameters that change before every step: nothing is lost, nobody drifts."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    PowerSGD,
    PowerSGDPlus,
    RandomBlock,
    RandomK,
    TopK,
    UniformQuantized,
)
from efsgd.testing import Traced
from efsgd.testing.gradients import gaussian
from efsgd.testing.strategies import seeds
from tests.compressors.made_compressors import make_workers as make_any_workers
from tests.promises.reference import Reference
from tests.promises.test_nothing_is_lost import LR, PLAIN, Balance
from tests.rank.rank_changes import Changes, change_reference, set_own
from tests.simulation import (
    difference,
    errors_of,
    make_workers,
    parameters_of,
    reference_for,
    replicated,
    step_with,
)
from tests.strategies import FULL_RANK_KINDS, Scenario, scenarios

# A dozen steps in float64 (2e-16) that differ in the order of sums, times the condition of what is
# orthogonalized: columns of Q that are new have 1e-3 of the others' length.
TOLERANCE = 1e-10
# Error feedback and power iteration make ten times as much of a difference in about twenty steps:
# of 1e-14 in a hundred, 1e-8. A query that is resized otherwise shows at 1e-2.
AFTER_100_STEPS = 1e-6

# Ranks below, at and above what the matrices have; with rates that leave some of them uncompressed.
RATES = {"rank": [None, 1, 2, 3, 5, 9], "min_compression_rate": [None, 0.0, 0.0, 1.0, 2.0]}


def assert_equal_workers(workers: Sequence[ErrorFeedbackSGD]) -> None:
    first = replicated(workers[0])
    assert all(replicated(worker) == first for worker in workers[1:])


def assert_like_reference(
    workers: Sequence[ErrorFeedbackSGD], reference: Reference, tolerance: float
) -> None:
    for index, parameter in enumerate(parameters_of(workers[0])):
        assert difference(parameter, reference.parameters[index]) < tolerance
        query = reference.queries[index]
        if reference.is_compressible(index) and query is not None:
            assert difference(workers[0].state[parameter]["q"], query) < tolerance
        for worker, optimizer in enumerate(workers):
            ours, theirs = errors_of(optimizer)[index], reference.errors[worker][index]
            if theirs.numel():  # an error can be all rounding, so it is compared beside Δ_w
                scale = reference.deltas[worker][index].abs().max() + 1
                assert (ours - theirs).abs().max() <= tolerance * scale


def run_beside_reference(
    scenario: Scenario, cuts: Sequence[int], changes: Changes, tolerance: float
) -> list[ErrorFeedbackSGD]:
    """A run that changes all parameters' settings before every step; all is checked after each."""
    hyper = scenario.hyperparameters
    workers: list[Any] = make_workers(scenario.parameters(), scenario.world_size, cuts, **hyper)
    reference, balance = reference_for(scenario), Balance(workers)
    for step in range(scenario.steps):
        own = changes.draw(len(scenario.shapes))
        set_own(workers, own)
        change_reference(reference, hyper, own)
        gradients = scenario.gradients(step)
        balance.step(workers, gradients)
        reference.step(gradients)
        assert_equal_workers(workers)
        assert_like_reference(workers, reference, tolerance)
    return workers


@settings(max_examples=15)
@given(
    scenarios(**PLAIN, momentum_form="sgd", maximize=False, error_feedback=True, warm_start=True,
              kinds=FULL_RANK_KINDS, layouts=["contiguous"], with_missing=False,
              min_steps=4, max_steps=8),
    st.integers(1, 4), st.lists(st.integers(1, 4), max_size=2), seeds(),
)  # fmt: skip
def test_other_ranks_before_every_step_are_the_paper_s_algorithm(
    scenario: Scenario, world_size: int, cuts: list[int], seed: int
) -> None:
    drawn = Scenario(scenario.shapes, world_size, scenario.hyperparameters, scenario.steps,
                     scenario.seed, scenario.kinds, scenario.layouts)  # fmt: skip
    run_beside_reference(drawn, cuts, Changes(RATES, seed), TOLERANCE)


def test_a_hundred_steps_with_other_ranks_before_each() -> None:
    shapes = [(12, 10), (10,), (9, 14), (12, 10)]
    own = {"lr": LR, "momentum_form": "sgd", "rank": 2, "min_compression_rate": 1.0}
    scenario = Scenario(shapes, 4, own, 100, 3, ["gaussian"] * 4, ["contiguous"] * 4)
    workers = run_beside_reference(scenario, (2,), Changes(RATES, 5), AFTER_100_STEPS)
    assert workers[0].param_groups[0]["step"] == 100


SHAPES = [(12, 10), (10,), (12, 10), (3, 4, 2, 2), ()]
DENSITIES = {"density": [None, 0.05, 0.3, 1.0]}
# Each with values of the settings that single parameters may have.
FAMILY: list[tuple[Any, dict[str, list[Any]]]] = [
    (PowerSGD(2, alternating=True), RATES),
    (PowerSGD(2, warm_start=False), RATES),
    (PowerSGDPlus(2, refresh_every=3), RATES),
    (PowerSGDPlus(2, refresh_every=2, refresh_update="exact"), RATES),
    (LQSGD(2, bits=12), RATES),
    (LQSGD(2, aggregation="scatter"), RATES),
    (TopK(density=0.1), DENSITIES),
    (TopK(density=0.1, scope="model"), {**DENSITIES, "scope": [None, "tensor", "model"]}),
    (RandomK(density=0.1), DENSITIES),
    (RandomBlock(density=0.1), DENSITIES),
    (UniformQuantized(bits=8), {"bits": [None, 5, 9, 16], "stochastic": [None, True, False]}),
]
NAMES = [f"{type(compressor).__name__} {number}" for number, (compressor, _) in enumerate(FAMILY)]


@pytest.mark.parametrize(("compressor", "choices"), FAMILY, ids=NAMES)
@settings(max_examples=3)
@given(world_size=st.integers(1, 4), seed=seeds())
def test_nothing_is_lost_and_workers_stay_equal(
    compressor: Any, choices: dict[str, list[Any]], world_size: int, seed: int
) -> None:
    start = [gaussian(shape, seed) for shape in SHAPES]
    workers: list[Any] = make_any_workers(start, world_size, compressor, lr=LR)
    balance, changes = Balance(workers), Changes(choices, seed)
    for step in range(8):
        set_own(workers, changes.draw(len(SHAPES)))
        balance.step(workers, [
            [gaussian(shape, seed, step, worker, i) for i, shape in enumerate(SHAPES)]
            for worker in range(world_size)
        ])  # fmt: skip
        assert_equal_workers(workers)


def test_each_parameter_sends_what_its_own_rank_asks_for() -> None:
    scenario = Scenario([(12, 10), (12, 10), (7,)], 2, {}, 4, 0, ["gaussian"] * 3,
                        ["contiguous"] * 3)  # fmt: skip
    workers: list[Any] = make_workers(scenario.parameters(), 2, lr=0.1, rank=2)
    set_own(workers, {"rank": (3, None, 5), "min_compression_rate": (None, float("inf"), None)})
    trace = step_with(workers, scenario.gradients(0))
    words = 3 + 2  # one for each parameter, one for each worker
    assert sizes(trace) == [words + 120 + 7 + 12 * 3, 10 * 3]
    first, second, _ = (workers[0].state[p] for p in parameters_of(workers[0]))
    assert first["q"].shape == (10, 3)
    set_own(workers, {"rank": (None, 4, None)})
    trace = step_with(workers, scenario.gradients(1))
    assert sizes(trace) == [words + 7 + 12 * 2 + 12 * 4, 10 * 2 + 10 * 4]
    assert first["q"].shape == (10, 2) and second["q"].shape == (10, 4)


def sizes(trace: Sequence[Traced]) -> list[int]:
    """Of what the two all-reduces of the step have sent, in numbers."""
    return [traced.shape[0] for traced in trace[-2:]]


def test_what_is_learned_survives_a_time_without_compression() -> None:
    scenario = Scenario([(12, 10)], 2, {}, 6, 0, ["gaussian"], ["contiguous"])
    workers: list[Any] = make_workers(scenario.parameters(), 2, lr=0.1, rank=4)
    for step in range(2):
        step_with(workers, scenario.gradients(step))
    learned = workers[0].state[parameters_of(workers[0])[0]]["q"].clone()
    set_own(workers, {"min_compression_rate": (float("inf"),)})
    for step in range(2, 4):
        step_with(workers, scenario.gradients(step))
    assert torch.equal(workers[0].state[parameters_of(workers[0])[0]]["q"], learned)
    assert not any(error.any() for worker in workers for error in errors_of(worker))
    set_own(workers, {"rank": (2,)})
    watched = []
    state = workers[0].state[parameters_of(workers[0])[0]]
    workers[0].watch(lambda _: watched.append(state["q"].clone()))
    step_with(workers, scenario.gradients(4))
    values = torch.linalg.svd(learned, full_matrices=False)[1]
    # The step began with the two directions that counted most. Rounding of a few sums in float64.
    assert difference(watched[0].norm(dim=0), values[:2]) < 1e-13
