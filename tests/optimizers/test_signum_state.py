"""Signum's state, of which the momenta are each worker's own: saved, loaded, averaged."""

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from efsgd import GradientAverager, PowerSGDOptimizer
from efsgd.checkpoint import averaging_, consolidation
from efsgd.checkpoint.distributed import ElasticLoadPlanner, OptimizerState
from efsgd.optimizers.signum import Signum
from efsgd.testing import lockstep, step_together
from tests.algorithms.test_signum import Reference, a_run, momenta_of, trained, workers_of
from tests.simulation import (
    bits,
    parameters_of,
    set_gradients,
    snapshot,
    step_with,
    through_a_file,
    train,
)


def stepped(optimizers: list[Signum], scenario: Any, steps: range) -> Any:
    train(scenario, steps, optimizers)
    return bits(snapshot(optimizers))


# ---- saving and loading -------------------------------------------------------------------------


def reloaded(optimizer: Signum) -> Signum:
    [twin], _ = a_run(1, lr=0.5, momentum=0.1)  # settings come from the file
    for mine, other in zip(parameters_of(optimizer), parameters_of(twin), strict=True):
        other.data.copy_(mine)
    twin.load_state_dict(through_a_file(optimizer.state_dict()))
    return twin


WAYS = [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), reloaded]


@pytest.mark.parametrize("way", WAYS, ids=["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("steps", [0, 3])
def test_each_worker_s_own_checkpoint_continues_to_the_bit(
    way: Callable[[Signum], Signum], steps: int
) -> None:
    workers, scenario = trained(steps)
    twins = [way(optimizer) for optimizer in workers]
    expected = stepped(workers, scenario, range(steps, steps + 3))
    assert stepped(twins, scenario, range(steps, steps + 3)) == expected


def test_the_state_is_complete_from_construction_and_keeps_its_keys() -> None:
    workers, scenario = a_run(2)
    expected = {"local_momentum", "momentum_started"}
    for step in range(3):
        for optimizer in workers:
            for p in parameters_of(optimizer):
                own = optimizer.state[p]
                assert own.keys() == expected
                assert own["local_momentum"].shape == p.shape
                assert bool(own["momentum_started"]) == (step > 0)
                assert bool(own["local_momentum"].any()) == (step > 0)
        step_with(workers, scenario.gradients(step))


def test_a_consolidated_checkpoint_has_the_mean_momentum_for_any_number_of_workers() -> None:
    workers, scenario = trained()
    own = [momenta_of(optimizer) for optimizer in workers]
    means = [sum(each[1:], each[0]) / 3 for each in zip(*own, strict=True)]
    before = bits(snapshot(workers))
    saved = lockstep([consolidation(optimizer) for optimizer in workers]).results
    assert bits(snapshot(workers)) == before
    assert bits(saved[0]) == bits(saved[1]) == bits(saved[2])
    kept = [saved[0]["state"][index]["local_momentum"] for index in range(4)]
    assert bits(kept) == bits(means)
    values = [p.detach() for p in parameters_of(workers[0])]
    for world_size in (1, 2, 3, 5):
        others = workers_of(values, world_size)
        for optimizer in others:
            optimizer.load_state_dict(saved[0])
            assert bits(momenta_of(optimizer)) == bits(means)
        reference = Reference(values, world_size, lr=0.01)
        reference.m = [[mean.clone() for _ in others] for mean in means]
        given = [scenario.gradients(5)[w % 3] for w in range(world_size)]
        step_with(others, given)  # without a warning
        reference.step(given)
        for p, x in zip(parameters_of(others[0]), reference.x, strict=True):
            assert torch.equal(p.detach(), x)


def test_averaging_in_place_is_consolidation_and_keeps_views() -> None:
    workers, scenario = trained()
    consolidated = lockstep([consolidation(optimizer) for optimizer in workers]).results
    lockstep([averaging_(optimizer) for optimizer in workers])
    for optimizer, expected in zip(workers, consolidated, strict=True):
        assert bits(optimizer.state_dict()) == bits(expected)
    loaded = workers_of([p.detach() for p in parameters_of(workers[0])], 3)
    for optimizer in loaded:
        optimizer.load_state_dict(consolidated[0])
    assert stepped(workers, scenario, range(3, 5)) == stepped(loaded, scenario, range(3, 5))


def test_another_worker_s_momenta_are_kept_with_a_warning() -> None:
    workers, scenario = trained()
    saved = copy.deepcopy(workers[0].state_dict())
    others = workers_of([p.detach() for p in parameters_of(workers[0])], 2)
    for optimizer in others:
        optimizer.load_state_dict(saved)
    set_gradients(others, scenario.gradients(4)[:2])
    expected = [
        0.9 * m + 0.1 * g
        for m, g in zip(momenta_of(workers[0]), scenario.gradients(4)[1], strict=True)
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step_together(others)
    for worker, warning in enumerate(caught):
        text = f"local momenta .* worker 0 of 3, and this is worker {worker} of 2: they were kept"
        assert re.search(text, str(warning.message))
    assert len(caught) == 2
    for m, other in zip(momenta_of(others[1]), expected, strict=True):
        assert torch.allclose(m, other)
    step_with(others, scenario.gradients(5)[:2])  # once is enough


def test_distributed_checkpoints_store_momenta_by_owner(tmp_path: Any) -> None:
    models = [torch.nn.Linear(4, 3) for _ in range(2)]
    optimizers = [Signum(model.parameters()) for model in models]
    set_gradients(optimizers[:1], [[torch.randn(3, 4), torch.randn(3)]])
    optimizers[0].step()
    states = [{"o": OptimizerState(m, o)} for m, o in zip(models, optimizers, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP's, of running without a process group
        metadata = dcp.save(states[0], checkpoint_id=tmp_path)
        dcp.load(states[1], checkpoint_id=tmp_path, planner=ElasticLoadPlanner())
    assert "o.errors.worker 0 of 1.weight.local_momentum" in metadata.state_dict_metadata
    assert "o.state.weight.local_momentum" not in metadata.state_dict_metadata
    assert bits(optimizers[1].state_dict()) == bits(optimizers[0].state_dict())
    assert bool(momenta_of(optimizers[1])[0].any())


def test_state_dicts_of_other_optimizers_are_refused_both_ways() -> None:
    model = torch.nn.Linear(4, 3)
    signum = Signum(model.parameters())
    others = [
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam(model.parameters()),
        PowerSGDOptimizer(model.parameters(), lr=0.1, momentum=0.9),
        GradientAverager(model.parameters()),
    ]
    before = bits(signum.state_dict())
    for other in others:
        with pytest.raises(ValueError, match=r"another optimizer's|Must be 'local' in a"):
            signum.load_state_dict(other.state_dict())
        assert bits(signum.state_dict()) == before
    for name, value in (("local_momentum", torch.ones(2)), ("momentum_started", torch.ones(1))):
        changed = copy.deepcopy(signum.state_dict())
        changed["state"][0][name] = value
        with pytest.raises(ValueError, match=f"Invalid {name} of parameter 0"):
            signum.load_state_dict(changed)
        assert bits(signum.state_dict()) == before
    with pytest.raises(ValueError, match="Invalid momentum_form: 'local'"):
        others[2].load_state_dict(signum.state_dict())


@pytest.mark.parametrize("world_size", [1, 3])
def test_replaced_momenta_are_adopted_and_wrong_ones_refused(world_size: int) -> None:
    workers, scenario = trained(world_size=world_size)
    for optimizer in workers:
        optimizer.state[parameters_of(optimizer)[0]]["local_momentum"] = torch.full((12, 10), -1e9)
    step_with(workers, scenario.gradients(3))
    assert all(bool((momenta_of(o)[0] < -8e8).all()) for o in workers)
    for optimizer in workers:
        optimizer.state[parameters_of(optimizer)[0]]["local_momentum"] = torch.ones(12, 9)
    for _ in range(2):  # also where sections are made anew
        with pytest.raises(ValueError, match="Invalid local_momentum of parameter 0"):
            step_with(workers, scenario.gradients(4))
        for optimizer in workers:
            optimizer.param_groups[0]["check_every"] = 7
