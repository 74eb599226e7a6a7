"""Checkpoints have what single parameters have of their own, and older ones leave it as it is."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from efsgd import ErrorFeedbackSGD, PowerSGDOptimizer, TopK
from efsgd.checkpoint import averaging_, consolidation
from efsgd.checkpoint.distributed import ElasticLoadPlanner, OptimizerState
from efsgd.testing import lockstep, step_together
from tests.rank.rank_changes import OWN, ranks, set_own
from tests.simulation import (
    a_run,
    bits,
    make_workers,
    parameters_of,
    set_gradients,
    snapshot,
    step_with,
    through_a_file,
    train,
)


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("way", [copy.deepcopy, through_a_file])
def test_a_loaded_run_goes_on_to_the_bit_also_in_the_middle_of_a_change(
    way: Callable[[Any], Any], kind: type
) -> None:
    workers, scenario = a_run(2)
    for step in range(2):
        set_own(workers, {"rank": kind((1, None, 3))})
        step_with(workers, scenario.gradients(step))
    for worker in workers:  # it is in the groups already, but not in the factors
        worker.param_groups[0]["per_parameter"] = {"rank": kind((None, None, 1))}
    others = make_workers([torch.zeros_like(p) for p in parameters_of(workers[0])], 2, lr=9.0)
    for old, new in zip(workers, others, strict=True):
        new.load_state_dict(way(old.state_dict()))
        assert new.param_groups[0]["per_parameter"] == {"rank": kind((None, None, 1))}
        with torch.no_grad():
            for own, theirs in zip(parameters_of(new), parameters_of(old), strict=True):
                own.copy_(theirs)
    train(scenario, range(2, 4), workers, others)
    assert bits(snapshot(others)) == bits(snapshot(workers))
    assert ranks(others[0]) == [2, None, 1]


def test_what_was_saved_before_a_change_keeps_what_it_had() -> None:
    [optimizer], scenario = a_run(1)
    set_own([optimizer], OWN)
    saved = optimizer.state_dict()
    set_own([optimizer], {"rank": (4, None, 4)})
    assert saved["param_groups"][0]["per_parameter"] == OWN
    step_with([optimizer], scenario.gradients(0))
    assert saved["param_groups"][0]["per_parameter"] == OWN
    # Nor does what is loaded change with the dict that it came from.
    optimizer.load_state_dict(copy.deepcopy(saved))
    saved["param_groups"][0]["per_parameter"] = {"rank": [9, 9, 9]}
    assert optimizer.param_groups[0]["per_parameter"] == OWN


def older(saved: dict[str, Any]) -> dict[str, Any]:
    del saved["param_groups"][0]["per_parameter"]
    return saved


def of_sgd(_: dict[str, Any]) -> dict[str, Any]:
    parameters = [p.detach().requires_grad_() for p in parameters_of(a_run(1)[0][0])]
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9).state_dict()


def of_top_k(_: dict[str, Any]) -> dict[str, Any]:
    parameters = [p.detach().requires_grad_() for p in parameters_of(a_run(1)[0][0])]
    own = {"density": (0.5, None, 0.25)}
    other = ErrorFeedbackSGD(
        [{"params": parameters, "per_parameter": own}], lr=0.05, compressor=TopK(density=0.1)
    )
    return copy.deepcopy(other.state_dict())


@pytest.mark.parametrize("edit", [older, of_sgd, of_top_k])
def test_a_dict_without_it_leaves_it_as_it_is(
    edit: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    [optimizer], scenario = a_run(1)
    saved = edit(copy.deepcopy(optimizer.state_dict()))
    set_own([optimizer], OWN)
    if edit is of_top_k:
        with pytest.warns(UserWarning, match="saved with TopK"):
            optimizer.load_state_dict(saved)
    else:
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["per_parameter"] == OWN
    assert ranks(optimizer) == [1, None, 3]
    step_with([optimizer], scenario.gradients(0))


def test_copies_and_pickles_have_it() -> None:
    [optimizer], scenario = a_run(1)
    set_own([optimizer], OWN)
    step_with([optimizer], scenario.gradients(0))
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    for twin in (copy.deepcopy(optimizer), torch.load(file, weights_only=False)):
        assert twin.param_groups[0]["per_parameter"] == OWN and ranks(twin) == [1, None, 3]


def test_checkpoints_for_any_number_of_workers_keep_it() -> None:
    workers, scenario = a_run(3)
    set_own(workers, OWN)
    train(scenario, range(2), workers)
    saved = lockstep([consolidation(worker) for worker in workers]).results
    lockstep([averaging_(worker) for worker in workers])
    for own in (saved[0], saved[2], copy.deepcopy(workers[1].state_dict())):
        newcomers = make_workers(parameters_of(workers[0]), 2, lr=9.0, rank=4)
        for worker in newcomers:
            worker.load_state_dict(through_a_file(own))
            assert worker.param_groups[0]["per_parameter"] == OWN
            assert ranks(worker) == [1, None, 3]
        set_gradients(newcomers, scenario.gradients(2)[:2])
        step_together(newcomers)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # there is no process group
def test_checkpoints_of_torch_distributed_keep_it(tmp_path: Path) -> None:
    def made() -> tuple[Any, PowerSGDOptimizer]:
        model = torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.Linear(10, 12))
        own = {"rank": (1, None, 3, None), "min_compression_rate": (None, None, 0.5, None)}
        groups = [{"params": model.parameters(), "per_parameter": own}]
        return model, PowerSGDOptimizer(groups, lr=0.1, rank=2)

    model, optimizer = made()
    model(torch.ones(1, 12)).sum().backward()
    optimizer.step()
    dcp.save({"own": OptimizerState(model, optimizer)}, checkpoint_id=tmp_path)
    expected = copy.deepcopy(optimizer.state_dict())
    model, optimizer = made()
    # The groups are those of the checkpoint; what decides the shapes has to be as it was saved.
    optimizer.param_groups[0]["per_parameter"] = None
    state = {"own": OptimizerState(model, optimizer)}
    dcp.load(state, checkpoint_id=tmp_path, planner=ElasticLoadPlanner())
    assert bits(optimizer.state_dict()) == bits(expected)
    assert optimizer.param_groups[0]["per_parameter"]["rank"] == (1, None, 3, None)
