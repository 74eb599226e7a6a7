"""State: complete, bit-exact, in our own dtypes, interchangeable with torch.optim.SGD's."""

import copy
from functools import partial
from typing import Any

import pytest
import torch

from efsgd import PowerSGDOptimizer
from efsgd.checkpoint import consolidated_state_dict, consolidation
from efsgd.testing import lockstep
from tests import simulation
from tests.simulation import (
    bits,
    difference,
    make_workers,
    parameters_of,
    snapshot,
    step_with,
    through_a_file,
    train,
)
from tests.strategies import Scenario

SHAPES = [(12, 10), (10,), (12, 10), (4, 3, 3, 3), ()]


a_run = partial(simulation.a_run, shapes=SHAPES, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"warm_start": False}, {"start_compressing_at": 6}, {"error_feedback": False},
     {"momentum_form": "sgd", "dampening": 0.5}],
    ids=str,
)  # fmt: skip
def test_resumed_is_uninterrupted_to_the_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    workers, scenario = a_run(dtype=dtype, **options)
    train(scenario, range(4), workers)
    saved = [through_a_file(optimizer.state_dict()) for optimizer in workers]
    values = [p.detach().clone() for p in parameters_of(workers[0])]
    resumed = make_workers(values, 3, lr=99.0, rank=1, seed=5)  # settings come from the file
    for optimizer, state_dict in zip(resumed, saved, strict=True):
        optimizer.load_state_dict(state_dict)
    train(scenario, range(4, 9), workers, resumed)
    assert bits(snapshot(resumed)) == bits(snapshot(workers))


def test_state_is_complete_from_construction_and_equal_in_kind_on_all_workers() -> None:
    workers, scenario = a_run()

    def kinds() -> list[Any]:
        return [
            [{k: (v.shape, v.dtype) for k, v in o.state[p].items()} for p in parameters_of(o)]
            for o in workers
        ]

    before = kinds()
    assert all(each == before[0] for each in before)
    assert set(before[0][0]) == {"momentum_buffer", "momentum_started", "error", "q"}
    assert set(before[0][1]) == {"momentum_buffer", "momentum_started"}
    step_with(workers, scenario.gradients(0))
    assert kinds() == before


def test_a_state_dict_that_training_went_over_is_refused() -> None:
    workers, scenario = a_run(1)
    step_with(workers, scenario.gradients(0))
    live = workers[0].state_dict()
    workers[0].load_state_dict(live)  # at once: nothing has been overwritten yet
    step_with(workers, scenario.gradients(1))
    live = {**workers[0].state_dict()}
    live["state"] = {key: dict(value) for key, value in live["state"].items()}
    step_with(workers, scenario.gradients(2))
    with pytest.raises(ValueError, match=r"copy\.deepcopy"):
        workers[0].load_state_dict(live)


def test_from_sgd_takes_over_a_live_optimizer() -> None:
    model = torch.nn.Linear(8, 6)
    groups = [{"params": [model.weight], "lr": 0.3}, {"params": [model.bias]}]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    twin = copy.deepcopy(model)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    sgd.step()
    ours = PowerSGDOptimizer.from_sgd(sgd, rank=99, min_compression_rate=0.0)
    buffer = sgd.state[model.weight]["momentum_buffer"]
    assert ours.state[model.weight]["momentum_buffer"] is buffer
    assert [group["lr"] for group in ours.param_groups] == [0.3, 0.1]
    assert ours.param_groups[0]["momentum_form"] == "sgd"
    theirs = torch.optim.SGD(
        [{"params": [twin.weight], "lr": 0.3}, {"params": [twin.bias]}],
        lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01,
    )  # fmt: skip
    theirs.step()
    ours.step()
    theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert difference(p, q) < 1e-6  # full rank: float32 rounding


@pytest.mark.parametrize("world_sizes", [(4, 2, 8), (2, 1, 3)])
def test_one_checkpoint_for_any_number_of_workers(world_sizes: tuple[int, ...]) -> None:
    # Every worker of each group gets the same mean gradient in other parts, so that the
    # trajectory with any number of workers should be that of one worker.
    scenario = Scenario(SHAPES, 1, {}, 12, 4)

    def parts(step: int, world_size: int) -> list[list[torch.Tensor | None]]:
        mean = [g for g in scenario.gradients(step)[0] if g is not None]
        noise = Scenario(SHAPES, world_size, {}, 12, 5)
        noises = noise.gradients(step)
        centers = [sum(own[i] for own in noises) / world_size for i in range(len(SHAPES))]
        return [[mean[i] + own[i] - centers[i] for i in range(len(SHAPES))] for own in noises]

    options = {"lr": 0.05, "momentum": 0.9, "rank": 2}
    workers = make_workers(scenario.parameters(), world_sizes[0], **options)
    straight = make_workers(scenario.parameters(), 1, **options)
    for phase, world_size in enumerate(world_sizes):
        if phase:
            saved = lockstep([consolidation(optimizer) for optimizer in workers]).results
            assert all(bits(each) == bits(saved[0]) for each in saved)
            values = [p.detach().clone() for p in parameters_of(workers[0])]
            workers = make_workers(values, world_size, lr=99.0)
            for optimizer in workers:
                optimizer.load_state_dict(through_a_file(saved[0]))
        for step in range(4 * phase, 4 * phase + 4):
            step_with(workers, parts(step, world_size))
            step_with(straight, scenario.gradients(step))
            for mine, other in zip(
                parameters_of(workers[0]), parameters_of(straight[0]), strict=True
            ):
                assert difference(mine, other) < 1e-9  # rounding, over twelve steps on noise


def test_consolidation_changes_nothing_in_the_optimizer() -> None:
    workers, scenario = a_run()
    step_with(workers, scenario.gradients(0))
    before = bits(snapshot(workers))
    saved = lockstep([consolidation(optimizer) for optimizer in workers]).results[0]
    assert bits(snapshot(workers)) == before
    errors = [o.state[parameters_of(o)[0]]["error"] for o in workers]
    assert difference(saved["state"][0]["error"], torch.stack(errors).mean(0)) < 1e-6
    assert torch.equal(saved["state"][0]["q"], workers[0].state[parameters_of(workers[0])[0]]["q"])
    # One worker needs no process group.
    alone, _ = a_run(1)
    assert bits(consolidated_state_dict(alone[0])) == bits(alone[0].state_dict())


def test_user_hooks_see_what_is_loaded_in_full_precision() -> None:
    workers, scenario = a_run(1, dtype=torch.bfloat16)
    step_with(workers, scenario.gradients(0))
    saved = copy.deepcopy(workers[0].state_dict())
    seen: list[torch.dtype] = []
    first = parameters_of(workers[0])[0]

    def replace(_: object, state_dict: dict[str, Any]) -> dict[str, Any]:
        changed = copy.deepcopy(state_dict)
        changed["state"][0]["error"] = torch.full((12, 10), 1.00001)
        return changed

    workers[0].register_load_state_dict_pre_hook(replace)
    workers[0].register_load_state_dict_post_hook(
        lambda optimizer: seen.append(optimizer.state[first]["error"].dtype)
    )
    workers[0].load_state_dict(saved)
    assert seen == [torch.float32]
    assert workers[0].state[first]["error"][0, 0].item() == pytest.approx(1.00001, abs=1e-7)
