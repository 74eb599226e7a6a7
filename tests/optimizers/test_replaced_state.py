"""State and parameter groups that users replace, delete or move between steps."""

import collections
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from efsgd import PowerSGDOptimizer
from tests.simulation import (
    SHAPES,
    a_run,
    bits,
    copied,
    errors_of,
    make_workers,
    parameters_of,
    set_gradients,
    snapshot,
    step_with,
    train,
    unchanged,
)
from tests.strategies import gaussian


def test_an_emptied_state_starts_anew() -> None:
    workers, scenario = a_run(1)
    train(scenario, range(3), workers)
    workers[0].state = collections.defaultdict(dict)
    fresh = make_workers([p.detach() for p in parameters_of(workers[0])], 1,
                         lr=0.05, momentum=0.9, rank=2)  # fmt: skip
    train(scenario, range(3, 6), workers, fresh)
    assert bits(parameters_of(workers[0])) == bits(parameters_of(fresh[0]))
    assert len(workers[0].state_dict()["state"]) == 3


def test_an_error_that_is_replaced_counts() -> None:
    workers, scenario = a_run(1, momentum=0.0)
    step_with(workers, scenario.gradients(0))
    first = parameters_of(workers[0])[0]
    workers[0].state[first]["error"] = torch.zeros(12, 10, dtype=torch.float64)
    before = first.detach().clone()
    step_with(workers, [[torch.zeros(shape) for shape in SHAPES]])
    assert torch.equal(first, before)


@pytest.mark.parametrize("form", ["paper", "sgd"])
@pytest.mark.parametrize(
    "given",
    [Tensor.clone, lambda buffer: buffer.T.contiguous().T, Tensor.float, None],
    ids=["same strides", "other strides", "other dtype", "deleted"],
)
def test_a_momentum_buffer_that_is_replaced_counts_and_one_that_is_deleted_is_zero(
    given: Callable[[Tensor], Tensor] | None, form: str
) -> None:
    workers, scenario = a_run(momentum_form=form)
    twins, _ = a_run(momentum_form=form)
    train(scenario, range(2), workers, twins)
    buffer = given(gaussian((12, 10), 5)) if given else torch.zeros(12, 10)
    for optimizer, twin in zip(workers, twins, strict=True):
        state = optimizer.state[parameters_of(optimizer)[2]]
        if given:
            state["momentum_buffer"] = buffer.clone()
        else:
            del state["momentum_buffer"]
        twin.state[parameters_of(twin)[2]]["momentum_buffer"].copy_(buffer)
    train(scenario, range(2, 5), workers, twins)
    assert bits(snapshot(workers)) == bits(snapshot(twins))  # and so the errors: nothing is lost


def test_a_momentum_buffer_is_checked_whatever_memory_it_lies_in() -> None:
    workers, scenario = a_run(1)
    step_with(workers, scenario.gradients(0))
    state = workers[0].state[parameters_of(workers[0])[2]]
    state["momentum_buffer"].resize_(5)  # the same object, as a new one may be by its id
    with (
        unchanged(workers),
        pytest.raises(ValueError, match="Invalid momentum_buffer of parameter 2"),
    ):
        step_with(workers, scenario.gradients(1))


def test_a_momentum_that_starts_anew_is_not_dampened() -> None:
    options = {"momentum_form": "sgd", "dampening": 0.5, "min_compression_rate": float("inf")}
    workers, scenario = a_run(1, **options)
    theirs = copied(parameters_of(workers[0]))
    sgd = torch.optim.SGD(theirs, lr=0.05, momentum=0.9, dampening=0.5)
    for step in range(4):
        if step == 2:
            for optimizer in (workers[0], sgd):
                del optimizer.state[parameters_of(optimizer)[2]]["momentum_buffer"]
        set_gradients([sgd], scenario.gradients(step))
        sgd.step()
        step_with(workers, scenario.gradients(step))
    assert bits(parameters_of(workers[0])) == bits(theirs)


def test_group_dicts_that_are_replaced_count() -> None:
    workers, scenario = a_run(1)
    step_with(workers, scenario.gradients(0))
    workers[0].param_groups = [{**group, "lr": 0.0} for group in workers[0].param_groups]
    before = bits(parameters_of(workers[0]))
    step_with(workers, scenario.gradients(1))
    assert bits(parameters_of(workers[0])) == before


def test_a_model_that_changes_its_dtype_takes_its_state_along() -> None:
    workers, scenario = a_run(1)
    step_with(workers, scenario.gradients(0))
    for parameter in parameters_of(workers[0]):
        parameter.data = parameter.data.float()
        parameter.grad = None
    step_with(workers, scenario.gradients(1))
    for parameter in parameters_of(workers[0]):
        state = workers[0].state[parameter]
        assert {value.dtype for value in state.values()} == {torch.float32, torch.bool}


def test_frozen_parameters_take_their_state_out_of_the_shared_buffers() -> None:
    workers, scenario = a_run(1)
    step_with(workers, scenario.gradients(0))
    first, _, third = parameters_of(workers[0])
    kept = workers[0].state[first]["error"].clone()
    first.requires_grad_(False)
    step_with(workers, scenario.gradients(1))
    error = workers[0].state[first]["error"]
    assert torch.equal(error, kept)
    assert error.untyped_storage().nbytes() == error.numel() * error.element_size()
    first.requires_grad_()
    step_with(workers, scenario.gradients(2))
    assert not torch.equal(workers[0].state[first]["error"], kept)
    assert workers[0].state[third]["error"].shape == (12, 10)


def test_error_feedback_that_is_switched_off_sends_what_was_left() -> None:
    workers, scenario = a_run(1)
    step_with(workers, scenario.gradients(0))
    workers[0].param_groups[0]["error_feedback"] = False
    step_with(workers, scenario.gradients(1))
    assert all(error.abs().sum() == 0 for error in errors_of(workers[0]))


def test_a_parameter_that_is_listed_twice_is_updated_once() -> None:
    parameter = torch.zeros(8, 8, requires_grad=True)
    single = torch.zeros(8, 8, requires_grad=True)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = PowerSGDOptimizer([parameter, parameter], lr=0.1, rank=2)
    once = PowerSGDOptimizer([single], lr=0.1, rank=2)
    for seed in range(3):
        parameter.grad = single.grad = gaussian((8, 8), seed).float()
        twice.step()
        once.step()
    assert torch.equal(parameter, single)
    twice.load_state_dict(copy.deepcopy(twice.state_dict()))
