"""Settings that differ between workers: an error in the same step, and nothing has changed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from efsgd import ErrorFeedbackSGD, GradientAverager, PowerSGD, TopK, WorkerMismatchError
from efsgd.optimizers.signum import Signum
from efsgd.testing import lockstep, step_together
from efsgd.wire.compare import GradientSummary, compare_gradients
from efsgd.wire.control_words import DIGESTS, ControlWords
from tests.simulation import a_run, bits, snapshot
from tests.strategies import gaussian

CHANGES: dict[str, Any] = {
    "lr": 0.06,
    "momentum": 0.8,
    "dampening": 0.1,
    "weight_decay": 1e-3,
    "nesterov": True,
    "maximize": True,
    "max_grad_norm": 2.5,
    "nonfinite": "skip",
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_named_on_all_workers_and_changes_nothing(name: str) -> None:
    workers, scenario = a_run(3, momentum_form="sgd")
    for step in range(2):
        give(workers, scenario.gradients(step))
        step_together(workers)
    group = workers[1].param_groups[0]
    before, group[name] = group[name], CHANGES[name]
    give(workers, scenario.gradients(2))
    kept = bits(snapshot(workers))
    words = f"{name}={before} in the group of parameter 0; worker 1: {name}={CHANGES[name]} in"
    with pytest.raises(WorkerMismatchError, match="Step 2 was abandoned") as caught:
        step_together(workers)
    assert f"workers 0, 2: {words}" in str(caught.value)
    assert len({note.partition(": ")[2] for note in caught.value.__notes__}) == 1
    assert bits(snapshot(workers)) == kept
    for worker in workers:  # what is equal again is accepted again
        worker.param_groups[0][name] = CHANGES[name]
    step_together(workers)


def give(workers: Any, gradients: Any) -> None:
    for optimizer, own in zip(workers, gradients, strict=True):
        for parameter, gradient in zip(optimizer.param_groups[0]["params"], own, strict=True):
            parameter.grad = gradient


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (lambda p: ErrorFeedbackSGD([p], compressor=TopK(density=0.1)), "lr", 0.5),
        (lambda p: GradientAverager([p], PowerSGD(rank=1)), "max_grad_norm", 1.0),
        (lambda p: Signum([p]), "momentum", 0.5),
    ],
    ids=["gathered", "averager", "votes"],
)
def test_all_optimizers_do(make: Callable[[Any], Any], name: str, value: float) -> None:
    parameters = [torch.zeros(12, 10, requires_grad=True) for _ in range(2)]
    workers = [make(parameter) for parameter in parameters]
    for number, parameter in enumerate(parameters):
        parameter.grad = gaussian((12, 10), number).float()
    step_together(workers)
    workers[1].param_groups[0][name] = value
    before = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(WorkerMismatchError, match=f"{name}="):
        step_together(workers)
    assert all(map(torch.equal, parameters, before))


def test_equal_numbers_of_other_types_do_not_differ() -> None:
    workers, scenario = a_run(2)
    give(workers, scenario.gradients(0))
    workers[0].param_groups[0].update(lr=1, weight_decay=0)
    workers[1].param_groups[0].update(lr=torch.tensor(1.0), weight_decay=0.0)
    step_together(workers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_digest_of_any_of_many_workers_is_read_as_it_was_written(dtype: torch.dtype) -> None:
    world_size, count = 64, 1000
    for digest in (0, 1, DIGESTS - 1):
        words = ControlWords(range(count), world_size, 0)
        code = words._code(5) + 2 * digest
        mean = torch.tensor([1.0] * count + [code] * world_size, dtype=dtype)
        mean[count:] /= world_size
        assert words._read(mean.tolist(), overflowed=False).is_good
        mean[-1] = (code + 2) / world_size
        assert words._read(mean.tolist(), overflowed=False).differing == (world_size - 1,)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"threads": 2}, "with 1, 2 threads"), ({"vector_units": 7}, "different vector units")],
)
def test_workers_that_round_differently_are_warned(change: Any, words: str) -> None:
    one = dataclasses.replace(GradientSummary.of([None]), threads=1)
    summaries = [one, dataclasses.replace(one, **change)]
    with pytest.warns(UserWarning, match=words):
        lockstep([compare_gradients(each, torch.device("cpu")) for each in summaries])
