"""`metrics()`: figures for loggers, of every optimizer of the package."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from efsgd import ErrorFeedbackSGD, GradientAverager, PowerSGD, PowerSGDOptimizer, Signum, TopK
from tests.simulation import a_run, bits, make_workers, parameters_of, step_with
from tests.strategies import Scenario, examples, scenarios

RELATIVE = "efsgd/relative_error"


def norm(tensors: list[Tensor]) -> float:
    return math.hypot(*(float(t.double().norm()) for t in tensors))


def expected(optimizer: Any, gradients: list[Tensor | None], absent: set[int]) -> dict[str, float]:
    """The relative errors of a step that is about to be taken with these gradients."""
    pairs = {}
    for number, (p, g) in enumerate(zip(parameters_of(optimizer), gradients, strict=True)):
        error = optimizer.state[p].get("error")
        if error is not None and number not in absent:
            given = torch.zeros_like(error) if g is None else g.to(p.dtype)
            pairs[f"{RELATIVE}/parameter {number}"] = error.clone(), given
    figures = {name: ratio(norm([e]), norm([g])) for name, (e, g) in pairs.items()}
    if pairs:
        errors, given = (norm([pair[n] for pair in pairs.values()]) for n in (0, 1))
        figures[RELATIVE] = ratio(errors, given)
    return figures


def ratio(error: float, gradient: float) -> float:
    if gradient == 0:
        return math.inf if error else 0.0
    return error / gradient


@examples(30)
@given(scenarios())
def test_relative_errors_are_those_that_one_computes(scenario: Scenario) -> None:
    names = ("rank", "min_compression_rate", "warm_start", "error_feedback")
    options = {name: scenario.hyperparameters[name] for name in names}
    asked, silent = (
        make_workers(scenario.parameters(), scenario.world_size, lr=0.1, **options)
        for _ in range(2)
    )
    for worker in asked:
        assert not any(name.startswith(RELATIVE) for name in worker.metrics())
    for step in range(scenario.steps):
        gradients = scenario.gradients(step)
        columns = enumerate(zip(*gradients, strict=True))
        absent = {number for number, column in columns if all(g is None for g in column)}
        wanted = [expected(*pair, absent) for pair in zip(asked, gradients, strict=True)]
        assert step_with(asked, gradients) == step_with(silent, gradients)  # the same traffic
        for worker, twin, figures in zip(asked, silent, wanted, strict=True):
            found = worker.metrics(by_layer=True)
            own = {name: value for name, value in found.items() if name.startswith(RELATIVE)}
            # Norms are float64's, summed in another order.
            assert own == pytest.approx(figures, rel=1e-12)
            assert bits(worker.state_dict()) == bits(twin.state_dict())
            assert twin.watchers == () and len(worker.watchers) == 1
            stats = {f"efsgd/{k}": v for k, v in worker.communication_stats().items()}
            assert {**found, **stats} == found and set(found) == set(stats) | set(own)
            assert all(type(value) is float for value in found.values())
            json.dumps(found)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: PowerSGDOptimizer(p, lr=0.1, momentum_form="sgd"),
        lambda p: ErrorFeedbackSGD(p, lr=0.1, momentum_form="sgd", compressor=TopK(0.1)),
        lambda p: GradientAverager(p, PowerSGD(rank=2)),
        lambda p: Signum(p, lr=0.1),
    ],
    ids=["PowerSGDOptimizer", "ErrorFeedbackSGD", "GradientAverager", "Signum"],
)
def test_every_optimizer_has_them_by_the_names_of_the_model(make: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Linear(30, 20))
    optimizer = make(model.named_parameters())
    assert "efsgd/ratio" not in optimizer.metrics()  # nothing was sent
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 20)).sum().backward()
        optimizer.step()
    found = optimizer.metrics(by_layer=True)
    assert found["efsgd/steps"] == 2 and found["efsgd/ratio"] > 1
    keeps_errors = not isinstance(optimizer, Signum)
    assert (RELATIVE in found) == keeps_errors
    assert (f"{RELATIVE}/0.weight" in found) == (f"{RELATIVE}/1.weight" in found) == keeps_errors
    assert RELATIVE in optimizer.metrics() or not keeps_errors


def test_the_norm_is_of_gradients_without_the_scale_of_the_loss() -> None:
    found = []
    for scale in (1.0, 2.0**12):
        [worker], scenario = a_run(world_size=1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale != 1)
        scaler.scale(torch.zeros(()))
        worker.metrics()
        for step in range(3):
            given = [g if g is None else g * scale for g in scenario.gradients(step)[0]]
            for parameter, gradient in zip(parameters_of(worker), given, strict=True):
                parameter.grad = gradient
            scaler.step(worker)
            scaler.update()
        found.append(worker.metrics()[RELATIVE])
    assert found[0] == found[1] > 0


def test_a_skipped_step_leaves_those_of_the_last_one() -> None:
    [worker], scenario = a_run(world_size=1, nonfinite="skip")
    worker.metrics()
    for step in range(2):
        step_with([worker], scenario.gradients(step))
    before = worker.metrics(by_layer=True)
    bad = [None if g is None else g * torch.nan for g in scenario.gradients(2)[0]]
    step_with([worker], [bad])
    after = worker.metrics(by_layer=True)
    assert after["efsgd/skipped_steps"] == before["efsgd/skipped_steps"] + 1
    assert {k: v for k, v in after.items() if RELATIVE in k} == {
        k: v for k, v in before.items() if RELATIVE in k
    }
