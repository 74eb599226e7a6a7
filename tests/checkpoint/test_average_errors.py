"""The mean of the errors in every worker's place: what changes, and all that does not."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from efsgd import PowerSGDOptimizer
from efsgd.checkpoint import (
    average_errors_,
    averaging_,
    consolidated_state_dict,
    consolidation,
)
from efsgd.errors import CollectiveError
from efsgd.testing import Traced, lockstep
from tests.simulation import (
    a_run,
    bits,
    difference,
    errors_of,
    make_workers,
    parameters_of,
    replicated,
    snapshot,
    step_with,
    train,
)
from tests.strategies import Scenario


def trained(steps: int = 4, **options: Any) -> tuple[list[PowerSGDOptimizer], Scenario]:
    workers, scenario = a_run(**options)
    train(scenario, range(steps), workers)
    return workers, scenario


def average(workers: list[PowerSGDOptimizer], **options: Any) -> list[Traced]:
    return lockstep([averaging_(optimizer) for optimizer in workers], **options).trace


@pytest.mark.parametrize("save", [PowerSGDOptimizer.state_dict, consolidated_state_dict])
@pytest.mark.parametrize("alternating", [False, True])
def test_what_is_saved_is_contiguous(
    save: Callable[[PowerSGDOptimizer], dict[str, Any]], alternating: bool
) -> None:
    """As safetensors asks for; momenta have the layout of their parameters, as in torch."""
    layer = torch.nn.Conv2d(4, 12, 3).to(memory_format=torch.channels_last)
    models = [layer, torch.nn.Linear(20, 12)]
    parameters = [p for model in models for p in model.parameters()]
    optimizer = PowerSGDOptimizer(
        parameters, lr=0.1, momentum=0.9, rank=2, momentum_form="sgd", alternating=alternating
    )
    optimizer.state["a note"] = {"of": "others"}
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    live = {parameter: dict(optimizer.state[parameter]) for parameter in parameters}
    assert not live[parameters[0]]["q"].is_contiguous()
    saved = save(optimizer)
    assert saved["state"].pop("a note") == {"of": "others"}
    for parameter in parameters:  # what steps work on stays where it is
        own = optimizer.state[parameter]
        assert own.keys() == live[parameter].keys()
        assert all(own[name] is value for name, value in live[parameter].items())
    for parameter, own in zip(parameters, saved["state"].values(), strict=True):
        assert bits(own) == bits(live[parameter])
        for name, value in own.items():
            expected = parameter.stride() == value.stride()
            assert value.is_contiguous() or (name == "momentum_buffer" and expected)
    before = optimizer.state[parameters[0]]["q"].clone()
    optimizer.load_state_dict(saved)
    assert bits(optimizer.state[parameters[0]]["q"]) == bits(before)


def test_every_worker_has_what_consolidation_has() -> None:
    workers, _ = trained()
    consolidated = lockstep([consolidation(optimizer) for optimizer in workers]).results
    assert bits(errors_of(workers[0])) != bits(errors_of(workers[1]))
    average(workers)
    for optimizer, expected in zip(workers, consolidated, strict=True):
        assert bits(optimizer.state_dict()) == bits(expected)


def test_nothing_but_errors_changes_and_views_stay_views() -> None:
    workers, _ = trained()
    before = bits([replicated(optimizer) for optimizer in workers])
    errors = [optimizer.state[parameters_of(optimizer)[0]]["error"] for optimizer in workers]
    nobody = {"params": 0, "worker": 0, "world_size": 0}
    groups = copy.deepcopy([[g | nobody for g in o.param_groups] for o in workers])
    sent = [optimizer.communication_stats() for optimizer in workers]
    average(workers)
    assert bits([replicated(optimizer) for optimizer in workers]) == before
    assert [[g | {"params": 0} for g in o.param_groups] for o in workers] == groups
    assert [optimizer.communication_stats() for optimizer in workers] == sent
    for optimizer, error in zip(workers, errors, strict=True):
        assert optimizer.state[parameters_of(optimizer)[0]]["error"] is error


@pytest.mark.parametrize("options", [{}, {"warm_start": False}, {"momentum_form": "sgd"}], ids=str)
def test_training_goes_on_as_it_would_have(options: dict[str, Any]) -> None:
    workers, scenario = trained(**options)
    others, _ = trained(**options)
    average(workers)
    for step in range(4, 9):
        train(scenario, [step], workers, others)
        assert all(bits(parameters_of(o)) == bits(parameters_of(workers[0])) for o in workers)
        for mine, plain in zip(parameters_of(workers[0]), parameters_of(others[0]), strict=True):
            # Both are right to float64's rounding, which power iteration amplifies a little.
            assert difference(mine, plain) < 1e-10


def test_averaged_and_resumed_is_uninterrupted_to_the_bit() -> None:
    workers, scenario = trained()
    average(workers)
    saved = copy.deepcopy(workers[0].state_dict())
    resumed = make_workers([p.detach().clone() for p in parameters_of(workers[0])], 3, rank=1)
    for optimizer in resumed:
        optimizer.load_state_dict(saved)
    train(scenario, range(4, 9), workers, resumed)
    assert bits(snapshot(resumed)) == bits(snapshot(workers))


def test_before_the_first_step_and_without_errors() -> None:
    for steps, options in [
        (0, {}),
        (2, {"error_feedback": False}),
        (2, {"rank": 12}),
        (0, {"rank": 12}),
    ]:
        workers, _ = trained(steps, **options)
        before = bits([optimizer.state_dict()["state"] for optimizer in workers])
        trace = average(workers)
        assert bits([optimizer.state_dict()["state"] for optimizer in workers]) == before
        assert len(trace) == 1 + (steps == 0 and not options)  # lists are compared first


def test_a_failed_collective_changes_nothing() -> None:
    workers, _ = trained()
    before = bits(snapshot(workers))
    with pytest.raises(CollectiveError, match="injected failure of errors"):
        average(workers, fail_at=1)
    assert bits(snapshot(workers)) == before


def test_errors_that_wait_to_be_sent_uncompressed_are_averaged_too() -> None:
    workers, _ = trained(1)
    for error in errors_of(workers[0]):
        error.zero_()  # a worker that had no error when compression ended
    total = [sum(each) / 3 for each in zip(*map(errors_of, workers), strict=True)]
    for optimizer in workers:
        optimizer.param_groups[0].update(
            min_compression_rate=1e9, momentum=0, momentum_form="sgd", lr=1.0
        )
    step_with(workers, [[None] * 3] * 3)  # nobody has a gradient: all errors still wait
    average(workers)
    before = [p.detach().clone() for p in parameters_of(workers[0])]
    step_with(workers, [[torch.zeros_like(p) for p in before]] * 3)
    for parameter, old, error in zip(parameters_of(workers[0]), before, total, strict=True):
        assert difference(old - error, parameter) < 1e-14  # a sum of three, in float64


def test_as_a_hook_of_state_dict_with_one_worker() -> None:
    workers, scenario = a_run(1)
    optimizer = workers[0]
    calls: list[Any] = []
    optimizer.register_state_dict_pre_hook(average_errors_)
    optimizer.register_state_dict_pre_hook(calls.append)
    step_with(workers, scenario.gradients(0))
    before = bits(errors_of(optimizer))
    saved = optimizer.state_dict()
    assert calls == [optimizer]
    assert bits(errors_of(optimizer)) == before
    assert any(bool(error.any()) for error in errors_of(optimizer))
    make_workers(parameters_of(optimizer), 1)[0].load_state_dict(saved)
