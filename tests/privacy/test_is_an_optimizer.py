"""A private optimizer is one like any other: for schedulers, hooks, checkpoints and policies."""

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efsgd import GradientAverager, PowerSGD, PowerSGDOptimizer
from efsgd.checkpoint import average_errors_, consolidated_state_dict
from efsgd.checkpoint.consolidated import averaging_, consolidation
from efsgd.privacy import PrivateOptimizer
from efsgd.rank import Accordion, RankScheduler
from efsgd.testing import lockstep
from tests.privacy.teams import (
    FAMILY,
    SETTINGS,
    SHAPES,
    Make,
    adamw,
    backward,
    batch,
    flat,
    give,
    hooked,
    made_records,
    power_sgd,
    private_team,
    seeded,
    signum,
    step_with,
    top_k,
)
from tests.simulation import bits, errors_of, parameters_of, through_a_file


def of_model(**settings: Any) -> tuple[nn.Module, PrivateOptimizer]:
    module = hooked()
    inner = PowerSGDOptimizer(module.parameters(), lr=0.1, rank=1)
    return module, PrivateOptimizer(inner, **{**SETTINGS, "module": module, **settings})


def test_it_is_an_optimizer_with_the_groups_and_state_of_the_wrapped_one() -> None:
    for make in FAMILY.values():
        team = private_team(2, make)
        step_with(team, made_records(SHAPES, [3, 3]))
        inner = team[0].original_optimizer
        assert isinstance(team[0], torch.optim.Optimizer)
        assert team[0].param_groups is inner.param_groups
        assert team[0].state is inner.state
        assert team[0].defaults is inner.defaults
        assert repr(inner) in repr(team[0])
        assert "noise_multiplier=1.0" in repr(team[0])


def test_learning_rate_schedulers() -> None:
    module, optimizer = of_model()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for rate in (0.1, 0.05, 0.025):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.zero_grad()
        backward(module, *batch(4))
        optimizer.step()
        scheduler.step()
    assert optimizer.communication_stats()["steps"] == 3


def test_closures_are_called_once_with_gradients_enabled() -> None:
    module, optimizer = of_model(generator=seeded(1)[0])
    twin, expected = of_model(generator=seeded(1)[0])
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        backward(module, *batch(4))
        calls.append(1)
        return 2.5

    with torch.no_grad():
        assert optimizer.step(closure) == 2.5
    assert len(calls) == 1
    backward(twin, *batch(4))
    expected.step()
    assert bits(parameters_of(optimizer)) == bits(parameters_of(expected))


@pytest.mark.parametrize("make", [power_sgd, adamw])
def test_hooks_run_once_per_step(make: Make) -> None:
    optimizer = private_team(1, make)[0]
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("load"))
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("save"))
    give([optimizer], made_records(SHAPES, [3]))
    optimizer.step()
    assert calls == ["before", "after"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls[2:] == ["save", "load"]


def test_groups_can_be_added() -> None:
    team = private_team(2, power_sgd)
    step_with(team, made_records(SHAPES, [3, 3]))
    for optimizer in team:
        added = torch.zeros(7, dtype=torch.float64, requires_grad=True)
        optimizer.add_param_group({"params": [added], "lr": 0.5})
    step_with(team, made_records([*SHAPES, (7,)], [3, 0]))
    last = [parameters_of(optimizer)[-1] for optimizer in team]
    assert bool((last[0] != 0).all())
    assert bits(last[0]) == bits(last[1])
    assert team[0].param_groups[1]["lr"] == 0.5


def test_parameters_that_are_not_trained_get_no_noise() -> None:
    team = private_team(2, power_sgd)
    for optimizer in team:
        parameters_of(optimizer)[2].requires_grad_(False)
    before = [parameters_of(optimizer)[2].clone() for optimizer in team]
    records = made_records(SHAPES, [3, 3])
    give(team, records)
    for optimizer in team:
        parameters_of(optimizer)[2].grad_sample = None
    lockstep([optimizer.exchange(2, worker) for worker, optimizer in enumerate(team)])
    assert bits(before) == bits([parameters_of(optimizer)[2].detach() for optimizer in team])
    assert parameters_of(team[0])[2].grad is None


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_a_saved_training_goes_on_as_if_nothing_had_been(make: Make) -> None:
    """With generators that go on; of an averager the state is saved by itself."""
    generators = seeded(1, 2)
    team = private_team(2, make, generators=generators)
    for step in range(2):
        step_with(team, made_records(SHAPES, [3, 2], step))
    saved = through_a_file([
        (o.state_dict(), o.averager and o.averager.state_dict(), parameters_of(o)) for o in team
    ])  # fmt: skip
    moved = [torch.Generator() for _ in generators]
    for other, generator in zip(moved, generators, strict=True):
        other.set_state(generator.get_state())
    resumed = private_team(2, make, generators=moved)
    for optimizer, (own, of_averager, values) in zip(resumed, saved, strict=True):
        optimizer.load_state_dict(own)
        if optimizer.averager is not None:
            optimizer.averager.load_state_dict(of_averager)
        with torch.no_grad():
            for parameter, value in zip(parameters_of(optimizer), values, strict=True):
                parameter.copy_(value)
    for own_team in (team, resumed):
        step_with(own_team, made_records(SHAPES, [1, 4], 5))
    for one, other_one in zip(team, resumed, strict=True):
        assert bits(parameters_of(one)) == bits(parameters_of(other_one))


@pytest.mark.parametrize("make", [power_sgd, top_k, signum])
def test_one_checkpoint_for_any_number_of_workers(make: Make) -> None:
    team = private_team(2, make)
    for step in range(2):
        step_with(team, made_records(SHAPES, [3, 2], step))
    saved = lockstep([consolidation(optimizer) for optimizer in team]).results
    assert bits(saved[0]) == bits(saved[1])
    assert saved[0]["privacy"] == team[0].state_dict()["privacy"]
    resumed = private_team(3, make, [p.detach() for p in parameters_of(team[0])])
    for optimizer in resumed:
        optimizer.load_state_dict(through_a_file(saved[0]))
    step_with(resumed, made_records(SHAPES, [3, 2, 0]))
    assert sum(each[-1] for each in resumed[0].state_dict()["privacy"]["releases"]) == 3


def test_errors_are_averaged() -> None:
    team = private_team(2, power_sgd)
    step_with(team, made_records(SHAPES, [3, 2]))
    before = [flat(errors_of(optimizer)) for optimizer in team]  # type: ignore[arg-type]
    lockstep([averaging_(optimizer) for optimizer in team])  # type: ignore[arg-type]
    for optimizer in team:
        after = flat(errors_of(optimizer))  # type: ignore[arg-type]
        assert (after - (before[0] + before[1]) / 2).abs().max() < 1e-15
    alone: Any = private_team(1, power_sgd)[0]
    average_errors_(alone)
    assert consolidated_state_dict(alone)["privacy"] == {"releases": []}


def test_ranks_may_change() -> None:
    """Policies see what has noise already: no more is spent."""
    team = private_team(2, lambda p: power_sgd(p, rank=1))
    schedulers: list[Any] = [
        RankScheduler(optimizer.original_optimizer, Accordion(low=1, high=2, interval=1))
        for optimizer in team
    ]
    for step in range(3):
        step_with(team, made_records(SHAPES, [3, 2], step))
        lockstep([s.exchange(2, worker) for worker, s in enumerate(schedulers)])
    assert bits(parameters_of(team[0])) == bits(parameters_of(team[1]))
    assert sum(each[-1] for each in team[0].state_dict()["privacy"]["releases"]) == 3


def test_an_averager_is_driven_by_step() -> None:
    parameters: list[Tensor] = [torch.zeros(4, 3, requires_grad=True)]
    averager = GradientAverager(parameters, PowerSGD(rank=1))
    optimizer = PrivateOptimizer(torch.optim.SGD(parameters, lr=1.0), **SETTINGS, averager=averager)
    optimizer.step()
    assert bool((parameters[0] != 0).all())
    assert optimizer.communication_stats()["steps"] == 1


def test_without_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the package does not need it, and the error names the extra."""
    for name in [n for n in sys.modules if n.split(".")[0] == "efsgd"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opacus", None)
    assert importlib.import_module("efsgd").PowerSGDOptimizer is not PowerSGDOptimizer
    with pytest.raises(ImportError, match=r"Opacus 1\.6.*pip install 'efsgd\[privacy\]'"):
        importlib.import_module("efsgd.privacy")
