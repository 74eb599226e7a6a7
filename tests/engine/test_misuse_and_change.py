"""What may go wrong on one worker alone or with numbers, and what users change between steps."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd import (
    CollectiveError,
    ErrorFeedbackSGD,
    PowerSGD,
    PowerSGDOptimizer,
    WorkerMismatchError,
)
from efsgd.testing import lockstep, step_together
from tests.simulation import (
    SHAPES,
    a_run,
    bits,
    difference,
    make_workers,
    parameters_of,
    set_gradients,
    snapshot,
    step_with,
)
from tests.strategies import Scenario, gaussian

# ---- one worker alone ---------------------------------------------------------------------------


class Unreadable(torch.Tensor):
    """A gradient that cannot be added to anything."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.add:
            raise NotImplementedError("unreadable")
        return super().__torch_function__(func, types, args, kwargs)


def test_an_error_of_one_worker_s_own_reaches_all_and_changes_nothing() -> None:
    workers, scenario = a_run()
    step_with(workers, scenario.gradients(0))
    before = bits(snapshot(workers))
    set_gradients(workers, scenario.gradients(1))
    parameters_of(workers[1])[0].grad = Unreadable(parameters_of(workers[1])[0].grad)
    # Each worker raises; lockstep shows worker 0's, and notes what the others raised.
    with pytest.raises(CollectiveError, match="say themselves why: worker 1") as caught:
        step_together(workers)
    assert any("worker 1: NotImplementedError" in note for note in caught.value.__notes__)
    parameters_of(workers[1])[0].grad = None  # it cannot be copied either
    assert bits(snapshot(workers)) == before
    twins, _ = a_run()
    step_with(twins, scenario.gradients(0))
    step_with(workers, scenario.gradients(1))
    step_with(twins, scenario.gradients(1))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


def test_a_worker_with_nothing_to_train_is_named() -> None:
    workers, scenario = a_run(2)
    set_gradients(workers, scenario.gradients(0))
    for parameter in parameters_of(workers[0]):
        parameter.requires_grad_(False)
    with pytest.raises(WorkerMismatchError, match=r"worker 0: parameter 0, .* frozen"):
        step_together(workers)


@pytest.mark.parametrize("key", ["momentum_buffer", "q"])
def test_replicated_state_that_starts_different_is_named(key: str) -> None:
    workers, scenario = a_run(2)
    workers[1].state[parameters_of(workers[1])[2]][key].add_(1e-9)
    with pytest.raises(WorkerMismatchError, match=f"{key} of parameter 2 differs"):
        step_with(workers, scenario.gradients(0))


def test_foreign_entries_in_a_group_are_nobody_s_business() -> None:
    workers, scenario = a_run(2)
    for optimizer in workers:
        optimizer.param_groups[0]["tag"] = object()
    step_with(workers, scenario.gradients(0))


def test_the_number_of_workers_may_change_in_mid_run() -> None:
    workers, scenario = a_run(2)
    step_with(workers, scenario.gradients(0)[:2])
    newcomer = make_workers([p.detach() for p in parameters_of(workers[0])], 1, lr=9.0)[0]
    newcomer.load_state_dict(copy.deepcopy(workers[0].state_dict()))
    workers.append(newcomer)
    with pytest.warns(UserWarning, match="those of worker 0 of 2, and this is worker 2 of 3"):
        trace = step_with(workers, scenario_of_three().gradients(1))
    assert [t.kind for t in trace] == ["AllGather"] * 3 + ["AllReduceMean"] * 2
    assert bits(parameters_of(workers[0])) == bits(parameters_of(newcomer))


def scenario_of_three() -> Scenario:
    return Scenario(SHAPES, 3, {}, 9, 4, ["gaussian"] * 3, ["contiguous"] * 3)


@pytest.mark.parametrize("parameters", [1, 3])
def test_a_broadcast_compares_parameter_lists_first(parameters: int) -> None:
    first = PowerSGDOptimizer([torch.zeros(4, 4).requires_grad_() for _ in range(2)])
    other = PowerSGDOptimizer([torch.ones(4, 5).requires_grad_() for _ in range(parameters)])
    exchanges = [o._engine.broadcast(o.param_groups, 0) for o in (first, other)]
    with pytest.raises(WorkerMismatchError, match=r"parameter 0, shape \[4, 5\]"):
        lockstep(exchanges)
    assert bool((parameters_of(other)[0] == 1).all())


@pytest.mark.parametrize(
    "change",
    [{"rank": 0}, {"rank": 2.0}, {"rank": None}, {"momentum_form": "foo"}, {"nesterov": True},
     {"dampening": 0.5}, {"nonfinite": "ignore"}],
    ids=str,
)  # fmt: skip
def test_settings_that_are_changed_are_checked(change: dict[str, Any]) -> None:
    workers, scenario = a_run(1)
    step_with(workers, scenario.gradients(0))
    workers[0].param_groups[0].update(change)
    before = bits(parameters_of(workers[0]))
    with pytest.raises(ValueError, match=r"Invalid|Pass momentum_form"):
        step_with(workers, scenario.gradients(1))
    assert bits(parameters_of(workers[0])) == before


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


@pytest.mark.parametrize("form", ["paper", "sgd"])
def test_float16_parameters_survive_updates_that_float16_could_not_hold(form: str) -> None:
    workers = make_workers(
        [torch.zeros(32, 32, dtype=torch.float16)], 1, lr=1e-6, rank=1, momentum_form=form
    )
    for seed in range(8):  # the error memory collects more than 65504
        step_with(workers, [[2e4 * gaussian((32, 32), seed).sign()]])
    assert all(p.isfinite().all() for p in parameters_of(workers[0]))


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
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            set_gradients(twins, _gradients(scenario))
            step_together(twins)
    finally:
        torch.set_default_dtype(torch.float32)
    assert bits(snapshot(workers)) == bits(snapshot(twins))


def _gradients(scenario: Scenario) -> Sequence[Sequence[Tensor | None]]:
    with torch.device("cpu"):
        return scenario.gradients(0)


# ---- mixed precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_skips_on_all_workers_when_one_overflows(unscale_first: bool) -> None:
    workers, scenario = a_run(2)
    twins, _ = a_run(2)

    def scaled_step(step: int, *, overflow: bool) -> None:
        set_gradients(workers, scenario.gradients(step))
        for worker, optimizer in enumerate(workers):
            for parameter in parameters_of(optimizer):
                assert parameter.grad is not None
                parameter.grad.mul_(1.0 if unscale_first else 1024.0)
            if overflow and worker == 1:
                parameters_of(optimizer)[0].grad[0, 0] = torch.inf
            # What torch.amp.GradScaler sets on an optimizer before it calls step().
            optimizer.grad_scale = None if unscale_first else torch.tensor(1024.0)
            optimizer.found_inf = torch.tensor(float(overflow and worker == 1))
        step_together(workers)
        for optimizer in workers:
            del optimizer.grad_scale, optimizer.found_inf

    scaled_step(0, overflow=False)
    step_with(twins, scenario.gradients(0))
    assert bits(snapshot(workers)) == bits(snapshot(twins))  # 1024 is a power of two
    scaled_step(1, overflow=True)
    assert bits(snapshot(workers)) == bits(snapshot(twins))
    assert workers[0].communication_stats()["skipped_steps"] == 1
    scaled_step(2, overflow=False)
    step_with(twins, scenario.gradients(2))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


def test_grad_scaler_itself() -> None:
    model = torch.nn.Linear(16, 12)
    optimizer = PowerSGDOptimizer(model.parameters(), lr=0.01, rank=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    before = copy.deepcopy(model.state_dict())
    for inputs in (torch.full((4, 16), torch.inf), torch.randn(4, 16)):
        optimizer.zero_grad()
        scaler.scale(model(inputs).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        if inputs.isinf().any():
            assert bits(model.state_dict()) == bits(before)
            assert scaler.get_scale() == 2.0**9
    assert difference(model.weight, before["weight"]) > 0
    stats = optimizer.communication_stats()
    assert (stats["steps"], stats["skipped_steps"]) == (1, 1)


# ---- compressors of others ----------------------------------------------------------------------


class Sparing(PowerSGD):
    """A compressor with fewer settings than PowerSGD."""

    def settings(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def shared_settings(self) -> tuple[str, ...]:
        return ()

    def validate(self, settings: Mapping[str, Any]) -> None:
        super().validate({**super().settings(), **settings})

    def level(self, shape: Sequence[int], settings: Mapping[str, Any]) -> int | None:
        return super().level(shape, {**super().settings(), **settings})

    def initial_state(self, entry: Any, settings: Mapping[str, Any]) -> dict[str, Tensor]:
        return super().initial_state(entry, {**super().settings(), **settings})

    def aggregator(self, layout: Any, settings: Mapping[str, Any], *where: Any) -> Any:
        return super().aggregator(layout, {**super().settings(), **settings}, *where)


def test_a_compressor_has_settings_of_its_own() -> None:
    ps = [gaussian((8, 8), i).float().requires_grad_() for i in range(2)]
    groups = [{"params": ps[:1], "rank": 1}, {"params": ps[1:]}]
    optimizer = ErrorFeedbackSGD(groups, lr=0.1, compressor=Sparing(rank=2))
    for p in ps:
        p.grad = torch.randn(8, 8)
    optimizer.step()
    assert [optimizer.state[p]["q"].shape[1] for p in ps] == [1, 2]
    assert "seed" not in optimizer.param_groups[0]
