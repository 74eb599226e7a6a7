"""The setting `batch_dims`, and what is kept of a stack: in groups, state and checkpoints."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    NonFiniteGradientError,
    PowerSGD,
    PowerSGDOptimizer,
    SpectralAtomo,
    TopK,
    WorkerMismatchError,
)
from efsgd.checkpoint.consolidated import consolidation
from efsgd.testing import lockstep
from tests.checkpoint.test_optimizer_state import copy_through, load, save, train
from tests.simulation import (
    a_run,
    bits,
    errors_of,
    parameters_of,
    step_with,
    through_a_file,
    unchanged,
)
from tests.stacks import Stack, Twins, apart
from tests.strategies import Shape

EXPERTS: list[Stack] = [((3,), (12, 10)), ((), (12, 10)), ((2, 2), (9, 8)), ((), (10,))]
SHAPES: list[Shape] = [(3, 12, 10), (10,), (4, 9, 8)]


# ---- the setting --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [PowerSGD, LQSGD, SpectralAtomo])
def test_every_compressor_of_the_family_checks_it(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid batch_dims: -1. Must be an integer of at least"):
        kind(batch_dims=-1)
    assert kind(batch_dims=2).settings()["batch_dims"] == 2


@pytest.mark.parametrize("one", [np.int64(1), np.array(1), torch.tensor(1)])
def test_integers_of_numpy_and_torch_will_do(one: Any) -> None:
    weight = torch.ones(3, 12, 10, requires_grad=True)
    weight.grad = torch.ones(3, 12, 10)
    optimizer = PowerSGDOptimizer([weight], lr=0.1, rank=2, batch_dims=one)
    optimizer.step()
    assert optimizer.state[weight]["q"].shape == (3, 10, 2)


def test_what_is_no_stack_of_matrices_is_sent_as_it_is() -> None:
    shapes = [(12, 10), (10,), (), (0, 12, 10), (3, 12, 10)]
    [optimizer], scenario = a_run(1, shapes, min_compression_rate=0.0, batch_dims=1)
    step_with([optimizer], scenario.gradients(0))
    compressed = ["q" in optimizer.state[p] for p in parameters_of(optimizer)]
    assert compressed == [False, False, False, False, True]
    sent = optimizer.communication_stats()["bytes_sent"]
    assert sent == 8 * (120 + 10 + 1 + 3 * 2 * (12 + 10) + len(shapes) + 1)


def test_min_compression_rate_is_that_of_each_matrix() -> None:
    compressor = PowerSGD(rank=2, batch_dims=1)  # a matrix of 4·8 numbers has 24 in its factors
    for rate, level in ((1.0, 2), (1.3, 2), (1.4, None)):
        settings = {**compressor.settings(), "min_compression_rate": rate}
        assert compressor.level((100, 4, 8), settings) == level


def test_workers_with_other_stacks_are_told() -> None:
    workers, scenario = a_run(2, SHAPES, batch_dims=1)
    step_with(workers, scenario.gradients(0))
    workers[1].param_groups[0]["batch_dims"] = 0
    with unchanged(workers), pytest.raises(WorkerMismatchError, match="batch_dims=1"):
        step_with(workers, scenario.gradients(1))


def test_a_compressor_without_the_setting_does_not_read_it() -> None:
    [stacked], scenario = a_run(1, SHAPES, batch_dims=1)
    step_with([stacked], scenario.gradients(0))
    top_k = TopK(density=0.1)
    other = ErrorFeedbackSGD(
        [p.detach().clone() for p in parameters_of(stacked)], 0.1, compressor=top_k
    )
    with pytest.warns(UserWarning, match="was saved with PowerSGD"):
        other.load_state_dict(copy.deepcopy(stacked.state_dict()))
    for parameter in parameters_of(other):
        parameter.requires_grad_()
    step_with([other], scenario.gradients(1))
    words = 8 * (len(SHAPES) + 1)
    expected = top_k.payload_bytes(SHAPES, torch.float64) + words
    assert other.communication_stats()["bytes_sent"] == expected


# ---- changes on the way -------------------------------------------------------------------------


def test_nothing_is_lost_where_other_dimensions_count_matrices() -> None:
    options = {"momentum": 0.0, "momentum_form": "sgd", "lr": 1.0, "min_compression_rate": 0.0}
    workers, scenario = a_run(3, [(3, 12, 10), (2, 2, 9, 8)], **options)
    start = [p.detach().clone() for p in parameters_of(workers[0])]
    total = [torch.zeros_like(p) for p in start]
    shapes = set()
    for step, batch_dims in enumerate([0, 1, 2, 1, 0, 1]):
        for worker in workers:
            worker.param_groups[0]["batch_dims"] = batch_dims
        gradients = scenario.gradients(step)
        step_with(workers, gradients)
        for index, each in enumerate(total):
            each += sum(own[index] for own in gradients) / 3
        shapes.add(tuple(workers[0].state[parameters_of(workers[0])[1]]["q"].shape))
    assert shapes == {(144, 2), (2, 72, 2), (2, 2, 8, 2)}
    for index, expected in enumerate(total):
        error = sum(errors_of(worker)[index] for worker in workers) / 3
        moved = start[index] - parameters_of(workers[0])[index].detach()
        # Sums of 18 gradients in float64.
        assert (moved + error - expected).abs().max() < 1e-12


def test_a_step_that_fails_keeps_the_factors_of_the_stack() -> None:
    workers, scenario = a_run(2, SHAPES, batch_dims=1)
    step_with(workers, scenario.gradients(0))
    own = [worker.param_groups[0] for worker in workers]
    gradients = scenario.gradients(1)
    gradients[1][0] = torch.full((3, 12, 10), torch.nan, dtype=torch.float64)
    with unchanged(workers):
        for group in own:
            group["batch_dims"] = 0
        with pytest.raises(NonFiniteGradientError):
            step_with(workers, gradients)
        for group in own:
            group["batch_dims"] = 1
    step_with(workers, scenario.gradients(1))


# ---- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("alternating", [False, True])
def test_a_loaded_stack_goes_on_with_the_same_bits(alternating: bool) -> None:
    twins = Twins(EXPERTS, PowerSGD(2, alternating=alternating), momentum=0.9)
    for step in range(3):
        twins.step(step)
    for worker, before in enumerate(twins.stacked):
        twins.stacked[worker] = after = twins.make()
        for target, source in zip(parameters_of(after), parameters_of(before), strict=True):
            target.data.copy_(source.data)
        after.load_state_dict(through_a_file(before.state_dict()))
    for step in range(3, 6):
        twins.step(step)
        twins.assert_equal()


def test_consolidated_errors_are_those_of_separate_matrices() -> None:
    twins = Twins(EXPERTS, PowerSGD(rank=2), momentum=0.9)
    for step in range(2):
        twins.step(step)
    stacked, separate = (
        lockstep([consolidation(worker) for worker in workers]).results[0]["state"]
        for workers in (twins.stacked, twins.separate)
    )
    found = [
        own for i, stack in enumerate(EXPERTS[:3]) for own in apart(stacked[i]["error"], stack)
    ]
    assert bits(found) == bits([separate[i]["error"] for i in range(8)])


class Mixture(nn.Module):
    """Experts, and a layer that each of them has a part in."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.ones(3, 12, 10))
        self.out = nn.Linear(10, 8)

    def optimizer(self, **experts: Any) -> PowerSGDOptimizer:
        groups = [{"params": [self.experts], **experts}, {"params": self.out.parameters()}]
        return PowerSGDOptimizer(groups, lr=0.1, momentum=0.9, rank=2)


def saved_without_the_setting(model: Mixture) -> PowerSGDOptimizer:
    """An optimizer as it was before there were stacks, trained."""
    optimizer = model.optimizer()
    train(model, optimizer)
    for group in optimizer.param_groups:
        del group["batch_dims"]
    return optimizer


def assert_drawn_anew(optimizer: PowerSGDOptimizer, before: Any, fresh: PowerSGDOptimizer) -> None:
    """Errors and momenta are those that were loaded, and Q is that of a fresh optimizer."""
    own, first = ({**each.state_dict()["state"][0]} for each in (optimizer, fresh))
    assert bits(own.pop("q")) == bits(first["q"])
    assert bits(own) == bits({name: value for name, value in before[0].items() if name != "q"})
    assert bits(optimizer.state_dict()["state"][1]) == bits(before[1])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("by_file", [False, True], ids=["state_dict", "DCP"])
@pytest.mark.parametrize("experts", [{}, {"batch_dims": 1}], ids=str)
def test_checkpoints_from_before_the_setting_load(
    by_file: bool, experts: dict[str, int], tmp_path: Path
) -> None:
    old, model = Mixture(), Mixture()
    before, fresh = saved_without_the_setting(old), Mixture().optimizer(**experts)
    state, optimizer = copy.deepcopy(before.state_dict()), model.optimizer(**experts)
    train(model, optimizer, range(1))
    if by_file:
        save(tmp_path, old, before)
        load(tmp_path, model, optimizer)
    else:
        optimizer.load_state_dict(state)
    assert [group["batch_dims"] for group in optimizer.param_groups] == [len(experts), 0]
    if experts:
        assert_drawn_anew(optimizer, state["state"], fresh)
    else:
        assert bits(optimizer.state_dict()["state"]) == bits(state["state"])
    train(model, optimizer, range(3, 5))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_keeps_stacks(tmp_path: Path) -> None:
    models = [Mixture(), Mixture()]
    first, second = models[0].optimizer(batch_dims=1), models[1].optimizer(batch_dims=1, rank=1)
    train(models[0], first)
    train(models[1], second, range(1))
    copy_through(tmp_path, (models[0], first), (models[1], second))
    assert second.state[models[1].experts]["q"].shape == (3, 10, 2)
