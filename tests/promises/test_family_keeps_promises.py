"""Promises 2, 3 and 5 for the whole family, while settings and the number of workers change."""

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efsgd import (
    LQSGD,
    CollectiveError,
    ErrorFeedbackSGD,
    PowerSGD,
    PowerSGDPlus,
    RandomBlock,
    RandomK,
    SignNorm,
    Signum,
    SymmetricQuantized,
    TopK,
    UniformQuantized,
)
from efsgd.checkpoint import consolidation
from efsgd.testing import lockstep
from efsgd.testing.gradients import Gradients, gaussian
from efsgd.testing.strategies import seeds
from tests.compressors.made_compressors import make_workers
from tests.promises.test_nothing_is_lost import LR, Balance
from tests.simulation import bits, parameters_of, replicated, snapshot, step_with
from tests.strategies import examples

SHAPES = [(12, 10), (10,), (12, 10), (3, 4, 2, 2), ()]
DENSITIES = {"density": [0.05, 0.3, 1.0]}
RATES = {"rank": [1, 2, 5], "min_compression_rate": [0.0, 1.0, float("inf")]}
# Each with values of the settings that may change from one step to the next.
FAMILY: list[tuple[Any, dict[str, list[Any]]]] = [
    (TopK(density=0.1), DENSITIES),
    (TopK(density=0.1, scope="model"), {"density": [0.05, 0.3], "scope": ["model", "tensor"]}),
    (RandomK(density=0.1), DENSITIES),
    (RandomBlock(density=0.1), DENSITIES),
    (SignNorm(), {}),
    (UniformQuantized(bits=8), {"bits": [6, 9]}),
    (SymmetricQuantized(bits=8), {"bits": [6, 9]}),
    (PowerSGD(2, alternating=True), RATES),
    (PowerSGDPlus(2, refresh_every=3), RATES),
    (PowerSGDPlus(2, refresh_every=2, refresh_update="exact"), RATES),
    (LQSGD(2, bits=12), RATES),
    (LQSGD(2, aggregation="scatter"), RATES),
]
NAMES = [f"{type(compressor).__name__} {number}" for number, (compressor, _) in enumerate(FAMILY)]


def gradients(world_size: int, *seed: int) -> Gradients:
    return [[gaussian(shape, w, i, *seed) for i, shape in enumerate(SHAPES)]
            for w in range(world_size)]  # fmt: skip


def workers_with(compressor: Any, world_size: int, *seed: int) -> list[ErrorFeedbackSGD]:
    parameters = [gaussian(shape, *seed) for shape in SHAPES]
    return make_workers(parameters, world_size, compressor, lr=LR)


@pytest.mark.parametrize(("compressor", "choices"), FAMILY, ids=NAMES)
@examples(12)
@given(
    data=st.data(), world_sizes=st.lists(st.integers(1, 4), min_size=2, max_size=2), seed=seeds()
)
def test_nothing_is_lost_and_workers_stay_equal_through_changes(
    compressor: Any, choices: dict[str, list[Any]], data: Any, world_sizes: list[int], seed: int
) -> None:
    workers = workers_with(compressor, world_sizes[0], seed)
    balance = Balance(workers)
    for phase, world_size in enumerate(world_sizes):
        if phase > 0:  # the run goes on with another number of workers
            loaded = lockstep([consolidation(worker) for worker in workers]).results[0]
            parameters = parameters_of(workers[0])
            workers = make_workers(parameters, world_size, compressor, lr=LR)
            for worker in workers:
                worker.load_state_dict(copy.deepcopy(loaded))
            balance.check(workers)
        for step in range(4):
            change = {
                name: data.draw(st.sampled_from(values), label=name)
                for name, values in choices.items()
            }
            for worker in workers:
                worker.param_groups[0].update(change)
            balance.step(workers, gradients(world_size, seed, phase, step))
            assert all(replicated(worker) == replicated(workers[0]) for worker in workers)


@pytest.mark.parametrize(
    "compressor", [*(each for each, _ in FAMILY), None], ids=[*NAMES, "Signum"]
)
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_failed_collective_changes_nothing(compressor: Any, step: int) -> None:
    def started() -> list[Any]:
        if compressor is not None:
            return workers_with(compressor, 2, 1)
        made = [[gaussian(shape, 1).requires_grad_() for shape in SHAPES] for _ in range(2)]
        return [Signum(own, lr=0.1) for own in made]

    workers, twins = started(), started()
    for number in range(step):
        for each in (workers, twins):
            step_with(each, gradients(2, number))
    collectives = len(step_with(twins, gradients(2, step)))
    before = bits(snapshot(workers))
    for fail_at in range(collectives):
        with pytest.raises(CollectiveError):
            step_with(workers, gradients(2, step), fail_at=fail_at)
        assert bits(snapshot(workers)) == before
    step_with(workers, gradients(2, step))
    assert bits(snapshot(workers)) == bits(snapshot(twins))
