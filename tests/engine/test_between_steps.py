"""Changes between steps, numbers that are hard to add, compressors of others, and warnings."""

import copy
import warnings

import pytest
import torch

from efsgd import PowerSGDOptimizer, WorkerMismatchError
from efsgd.errors import warn_user
from efsgd.testing import step_together
from tests.simulation import (
    a_run,
    bits,
    broadcast,
    make_workers,
    parameters_of,
    set_gradients,
    snapshot,
    step_with,
)
from tests.strategies import gaussian

# ---- changes ------------------------------------------------------------------------------------


def test_foreign_entries_in_a_group_are_nobody_s_business() -> None:
    workers, scenario = a_run(2)
    for optimizer in workers:
        optimizer.param_groups[0]["tag"] = object()
    step_with(workers, scenario.gradients(0))


@pytest.mark.parametrize("form", ["sgd", "paper"])
@pytest.mark.parametrize("how", ["replaced", "begun anew", "written to"])
def test_momenta_that_are_changed_after_many_steps_are_used_from_then_on(
    form: str, how: str
) -> None:
    p = torch.zeros(3, requires_grad=True)
    options = {"momentum": 0.5, "dampening": 0.5 if form == "sgd" else 0}
    optimizer = PowerSGDOptimizer([p], lr=1.0, momentum_form=form, **options)
    own = optimizer.state[p]
    for step in range(6):
        if step == 4 and how == "replaced":
            own["momentum_buffer"] = torch.full((3,), 8.0)
        elif step == 4 and how == "begun anew":
            own["momentum_started"].fill_(False)
            own["momentum_buffer"].zero_()
        elif step == 4:
            own["momentum_buffer"].fill_(8.0)
        before = own["momentum_buffer"].clone()
        p.grad = torch.ones(3)
        optimizer.step()
        is_first = form == "sgd" and (step == 0 or (step == 4 and how == "begun anew"))
        share = 1.0 if form == "paper" or is_first else 0.5
        assert own["momentum_buffer"].tolist() == (0.5 * before + share).tolist()


def test_the_number_of_workers_may_change_in_mid_run() -> None:
    workers, scenario = a_run(2)
    step_with(workers, scenario.gradients(0)[:2])
    newcomer = make_workers([p.detach() for p in parameters_of(workers[0])], 1, lr=9.0)[0]
    newcomer.load_state_dict(copy.deepcopy(workers[0].state_dict()))
    workers.append(newcomer)
    with pytest.warns(UserWarning, match="those of worker 0 of 2, and this is worker 2 of 3"):
        trace = step_with(workers, a_run(3)[1].gradients(1))
    assert [t.kind for t in trace] == ["AllGather"] * 3 + ["AllReduceMean"] * 2
    assert bits(parameters_of(workers[0])) == bits(parameters_of(newcomer))


@pytest.mark.parametrize("parameters", [1, 3])
def test_a_broadcast_compares_parameter_lists_first(parameters: int) -> None:
    first = PowerSGDOptimizer([torch.zeros(4, 4).requires_grad_() for _ in range(2)])
    other = PowerSGDOptimizer([torch.ones(4, 5).requires_grad_() for _ in range(parameters)])
    with pytest.raises(WorkerMismatchError, match=r"parameter 0, shape \[4, 5\]"):
        broadcast([first, other])
    assert bool((parameters_of(other)[0] == 1).all())


# ---- numbers ------------------------------------------------------------------------------------


def test_a_momentum_that_rests_at_zero_for_a_while_is_algorithm_2() -> None:
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = PowerSGDOptimizer([x], lr=1.0, momentum=0.5)
    expected, m = 0.0, 0.0
    for momentum in (0.5, 0.0, 0.5, 0.5):
        optimizer.param_groups[0]["momentum"] = momentum
        x.grad = torch.ones(1, dtype=torch.float64)
        optimizer.step()
        m = momentum * m + 1.0
        expected -= 1.0 + m
    assert x.item() == expected  # all numbers are short in binary


def test_a_sum_is_rounded_once_in_bfloat16() -> None:
    # Δ' = 0.0018 and λ = 0: x = 1 - 2 Δ' = 0.9964, next to 0.99609375 in bfloat16. Two steps of
    # 0.0018 would each be rounded away.
    x = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    optimizer = PowerSGDOptimizer([x], lr=1.0)
    x.grad = torch.full((1,), 0.0018, dtype=torch.bfloat16)
    optimizer.step()
    assert x.item() == 0.99609375


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fused_serves_every_memory_format(momentum: float) -> None:
    start = gaussian((8, 4, 3, 3), 1).float().to(memory_format=torch.channels_last)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    options = {"lr": 0.1, "momentum": momentum, "fused": True}
    optimizer = PowerSGDOptimizer([ours], momentum_form="sgd", start_compressing_at=9, **options)
    expected = torch.optim.SGD([theirs], **options)
    for seed in range(3):
        gradient = gaussian((8, 4, 3, 3), 2, seed).float()
        ours.grad, theirs.grad = gradient, gradient.to(memory_format=torch.channels_last)
        optimizer.step()
        expected.step()
    assert torch.equal(ours, theirs)


def test_default_dtypes_and_devices_do_not_matter() -> None:
    workers, scenario = a_run(2)
    twins, _ = a_run(2)
    step_with(workers, scenario.gradients(0))
    set_gradients(twins, scenario.gradients(0))
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            step_together(twins)
    finally:
        torch.set_default_dtype(torch.float32)
    assert bits(snapshot(workers)) == bits(snapshot(twins))


# ---- compressors of others ----------------------------------------------------------------------


# ---- warnings ------------------------------------------------------------------------------------


def test_a_warning_names_the_line_of_the_caller() -> None:
    with pytest.warns(UserWarning, match="an example") as caught:
        warn_user("an example")
    assert caught[0].filename == __file__


def test_a_warning_of_a_step_names_the_line_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = torch.ones(12, 10, requires_grad=True)
    optimizer = PowerSGDOptimizer([parameter])
    optimizer.state[parameter]["error"] += 1
    saved = optimizer.state_dict()
    saved["param_groups"][0].update(worker=1, world_size=2)
    optimizer.load_state_dict(saved)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    assert "those of worker 1 of 2, and this is worker 0 of 1" in str(caught[0].message)
