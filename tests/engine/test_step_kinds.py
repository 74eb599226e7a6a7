"""Where steps are of several kinds, workers still agree: no hang, whatever step it is."""

from typing import Any

import pytest
import torch

from efsgd import CollectiveError, ErrorFeedbackSGD, PowerSGD, PowerSGDPlus, WorkerMismatchError
from tests.simulation import bits, parameters_of, replicated, snapshot, step_with, unchanged
from tests.strategies import Gradients, gaussian

SHAPES = [(8, 6), (6,), (5, 7)]
COMPRESSORS = {
    "warm": PowerSGD(2, min_compression_rate=0.5),
    "alternating": PowerSGD(2, alternating=True, min_compression_rate=0.5),
    "refresh": PowerSGDPlus(2, refresh_every=3, min_compression_rate=0.5),
    "exact refresh": PowerSGDPlus(
        2, refresh_every=2, refresh_update="exact", min_compression_rate=0.5
    ),
}
STEPS = range(5)  # both kinds of steps, known to the workers already and not


def a_run(compressor: Any, **options: Any) -> list[ErrorFeedbackSGD]:
    workers = []
    for _ in range(3):
        own = [gaussian(shape, 5, i).requires_grad_() for i, shape in enumerate(SHAPES)]
        workers.append(ErrorFeedbackSGD(own, lr=0.1, compressor=compressor, **options))
    return workers


def gradients(step: int) -> Gradients:
    return [[gaussian(shape, w, step, i) for i, shape in enumerate(SHAPES)] for w in range(3)]


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("step", STEPS)
def test_a_change_on_one_worker_is_an_error_on_all(name: str, step: int) -> None:
    workers = a_run(COMPRESSORS[name])
    for number in range(step):
        step_with(workers, gradients(number))
    workers[1].param_groups[0]["rank"] = 3
    mismatch = pytest.raises(WorkerMismatchError, match=r"rank=[23] in the group")
    with unchanged(workers), mismatch:
        step_with(workers, gradients(step))
    workers[1].param_groups[0]["rank"] = 2
    untouched = a_run(COMPRESSORS[name])
    for number in range(step + 4):
        step_with(untouched, gradients(number))
        if number >= step:
            step_with(workers, gradients(number))
    assert bits(snapshot(workers)) == bits(snapshot(untouched))


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("step", STEPS)
def test_an_error_of_one_worker_is_an_error_on_all(name: str, step: int) -> None:
    workers = a_run(COMPRESSORS[name], momentum=0.9)
    for number in range(step):
        step_with(workers, gradients(number))
    spoiled = workers[2].state[parameters_of(workers[2])[0]]
    kept, spoiled["momentum_buffer"] = spoiled["momentum_buffer"], torch.zeros(2)
    errors = (CollectiveError, WorkerMismatchError)  # and no hang, which lockstep would notice
    with unchanged(workers[:2]), pytest.raises(errors) as caught:
        step_with(workers, gradients(step))
    assert any("momentum_buffer" in note for note in caught.value.__notes__)
    spoiled["momentum_buffer"] = kept
    for number in range(step, step + 3):
        step_with(workers, gradients(number))
        assert all(replicated(worker) == replicated(workers[0]) for worker in workers)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_change_on_all_workers_is_none(name: str) -> None:
    workers = a_run(COMPRESSORS[name])
    for step in range(7):
        for worker in workers:
            worker.param_groups[0]["rank"] = 1 + step % 3
        step_with(workers, gradients(step))
        assert all(replicated(worker) == replicated(workers[0]) for worker in workers)
