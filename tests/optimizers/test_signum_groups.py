"""Signum's groups, dtypes, schedules and arguments, and what it does not take."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd import ErrorFeedbackSGD, GradientAverager, WorkerMismatchError
from efsgd.compressors.majority_vote import MajorityVote
from efsgd.optimizers.signum import Signum
from efsgd.testing import step_together
from tests.algorithms.test_signum import ROUNDING, Reference, a_run, momenta_of, trained, workers_of
from tests.simulation import bits, parameters_of, set_gradients, snapshot, step_with
from tests.strategies import gaussian


def test_a_frozen_parameter_keeps_its_momentum_and_goes_on_with_it() -> None:
    workers, scenario = trained(weight_decay=0.1)
    reference = Reference(a_run()[1].parameters(), 3, lr=0.01, weight_decay=0.1)
    for step in range(8):
        given = scenario.gradients(step)
        if step in (3, 6):
            for optimizer in workers:
                parameters_of(optimizer)[0].requires_grad_(step == 6)
        if step >= 3:
            step_with(workers, given)
        for own in given if 3 <= step < 6 else ():
            own[0] = None
        reference.step(given)
    for p, x in zip(parameters_of(workers[0]), reference.x, strict=True):
        assert torch.allclose(p.detach(), x, ROUNDING, ROUNDING)


def test_groups_have_their_own_settings() -> None:
    options: list[dict[str, Any]] = [
        {"lr": 0.1, "momentum": 0.0},
        {"lr": 0.2, "momentum": 0.5, "maximize": True},
        {"lr": 0.3, "weight_decay": 0.1},
    ]
    start = [gaussian((4, 3), index) for index in range(3)]  # one batch, of three momenta
    together, alone = [], []
    for _ in range(3):
        own = [p.clone().requires_grad_() for p in start]
        groups = [{"params": [p], **o} for p, o in zip(own, options, strict=True)]
        optimizer = Signum(groups[:2])
        optimizer.add_param_group(groups[2])
        together.append(optimizer)
    alone = [workers_of([p], 3, **o) for p, o in zip(start, options, strict=True)]
    for step in range(4):
        given = [[gaussian((4, 3), 9, step, w, i) for i in range(3)] for w in range(3)]
        step_with(together, given)
        for index, workers in enumerate(alone):
            step_with(workers, [[own[index]] for own in given])
    for optimizer in together:
        expected = [bits(parameters_of(workers[0])[0]) for workers in alone]
        assert bits(parameters_of(optimizer)) == expected


def test_schedules_may_cycle_momentum_without_another_word_between_workers() -> None:
    workers, scenario = a_run()
    reference = Reference(scenario.parameters(), 3)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=8) for o in workers]
    seen = set()
    for step in range(7):
        set_gradients(workers, scenario.gradients(step))
        now = {name: workers[0].param_groups[0][name] for name in ("lr", "momentum")}
        seen.add(now["momentum"])
        reference.options |= now
        reference.step(scenario.gradients(step))
        trace = step_together(workers)
        assert len(trace) == 2 or step == 0
        for optimizer, schedule in zip(workers, schedules, strict=True):
            optimizer._opt_called = True  # as `step()` notes it
            schedule.step()
    assert len(seen) > 4
    for p, x in zip(parameters_of(workers[0]), reference.x, strict=True):
        assert torch.allclose(p.detach(), x, ROUNDING, ROUNDING)


def test_parts_of_complex_parameters_are_voted_on_separately() -> None:
    start = [torch.complex(gaussian((5, 3), 1), gaussian((5, 3), 2)), gaussian((4,), 3)]
    complex_ones = workers_of(start[:1], 3, torch.complex128, weight_decay=0.1)
    real_ones = workers_of([torch.view_as_real(start[0])], 3, weight_decay=0.1)
    for step in range(3):
        given = [
            torch.complex(gaussian((5, 3), 4, step, w), gaussian((5, 3), 5, step, w))
            for w in range(3)
        ]
        step_with(complex_ones, [[g] for g in given])
        step_with(real_ones, [[torch.view_as_real(g)] for g in given])
    mine, other = parameters_of(complex_ones[1])[0], parameters_of(real_ones[1])[0]
    assert torch.equal(torch.view_as_real(mine.detach()), other.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_step_is_rounded_to_the_parameter_s_dtype_once(dtype: torch.dtype) -> None:
    start = (3 * gaussian((200,), 1)).to(dtype)
    [optimizer] = workers_of([start], 1, dtype, lr=0.25, weight_decay=1e-3)
    gradient = gaussian((200,), 2).to(dtype)
    step_with([optimizer], [[gradient]])
    assert momenta_of(optimizer)[0].dtype == torch.float32
    vote = torch.where(gradient >= 0, 1.0, -1.0)
    exact = start.double() - 0.25 * (vote.double() + 1e-3 * start.double())
    expected = (start.float() - 0.25 * torch.add(vote, start.float(), alpha=1e-3)).to(dtype)
    assert torch.equal(parameters_of(optimizer)[0].detach(), expected)
    half_a_unit = torch.finfo(dtype).eps * exact.abs().clamp(min=0.25)
    assert bool(((expected.double() - exact).abs() <= half_a_unit).all())


def test_memory_formats_make_no_difference() -> None:
    start = gaussian((4, 3, 2, 5), 1)
    given = [[gaussian((4, 3, 2, 5), 2, w)] for w in range(3)]
    results = []
    for form in (torch.contiguous_format, torch.channels_last):
        made = [start.clone(memory_format=form).requires_grad_() for _ in range(3)]
        workers = [Signum([p]) for p in made]
        step_with(workers, given)
        results.append(bits([made, momenta_of(workers[2])]))
    assert results[0] == results[1]


# ---- arguments ----------------------------------------------------------------------------------

BAD = [
    ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    ({"lr": torch.ones(2)}, ValueError, "Tensor lr must be 1-element"),
    ({"lr": float("nan")}, ValueError, "Invalid lr: nan. Must be finite"),
    ({"lr": "fast"}, TypeError, "Invalid lr: 'fast'. Must be a number"),
    ({"momentum": -0.1}, ValueError, "Invalid momentum value: -0.1"),
    ({"momentum": 1.0}, ValueError, "Invalid momentum value: 1.0. Must be at least 0 and below 1"),
    ({"weight_decay": -0.1}, ValueError, "Invalid weight_decay value: -0.1"),
    ({"nonfinite": "ignore"}, ValueError, "Invalid nonfinite: 'ignore'"),
    ({"check_every": -1}, ValueError, "Invalid check_every: -1"),
    ({"process_group": 3}, TypeError, "Invalid process_group: 3"),
]
FIXED = [("error_feedback", True), ("start_compressing_at", 3), ("max_grad_norm", 1.0)]


@pytest.mark.parametrize(("options", "error", "text"), BAD, ids=lambda value: str(value)[:30])
def test_bad_arguments_are_refused(
    options: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        Signum([torch.ones(3, requires_grad=True)], **options)
    if "process_group" not in options:  # so are they in groups, in the first step and later
        workers, scenario = trained(1)
        for optimizer in workers:
            optimizer.param_groups[0].update(options)
        before = bits([parameters_of(optimizer) for optimizer in workers])
        with pytest.raises(error, match=text):
            step_with(workers, scenario.gradients(1))
        assert bits([parameters_of(optimizer) for optimizer in workers]) == before


@pytest.mark.parametrize(("name", "value"), FIXED)
def test_what_a_vote_cannot_do_is_refused(name: str, value: Any) -> None:
    parameter = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match=f"Invalid {name}: {value}. Must be .* in a Signum"):
        Signum([{"params": [parameter], name: value}])
    assert ErrorFeedbackSGD([{"params": [parameter], name: value}], lr=0.1)


@pytest.mark.parametrize("kind", [ErrorFeedbackSGD, GradientAverager])
def test_no_other_optimizer_votes(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"for a majority vote: .* Must be 'local'.*Signum"):
        kind([torch.ones(3, requires_grad=True)], compressor=MajorityVote())


def test_a_closure_is_called_once_and_a_tensor_is_a_learning_rate() -> None:
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = Signum([x], lr=torch.tensor(0.5))
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        loss = x.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 5.0
    assert len(calls) == 1
    assert x.tolist() == [0.5, -1.5]


# ---- scalers, sparse gradients, checks ----------------------------------------------------------


def test_a_scaler_s_overflow_is_skipped_and_its_scale_does_not_matter() -> None:
    (plain,), scenario = a_run(1)
    (scaled,), _ = a_run(1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for step in range(3):
        for optimizer in (plain, scaled):
            set_gradients([optimizer], scenario.gradients(step))
        scaler.scale(torch.tensor(0.0))
        for p in parameters_of(scaled):
            p.grad.mul_(scaler.get_scale())
        if step == 1:
            before = bits(snapshot([scaled]))
            parameters_of(scaled)[0].grad[3, 3] = math.inf
        scaler.step(scaled)
        scaler.update()
        if step == 1:
            assert bits(snapshot([scaled])) == before
        else:
            plain.step()
    assert scaler.get_scale() == 2.0**15
    # It was told, and took part: with several workers, others may wait for it.
    assert scaled.communication_stats()["skipped_steps"] == 1
    assert bits(snapshot([plain])) == bits(snapshot([scaled]))


def test_sparse_gradients_are_refused_and_dense_ones_go_on() -> None:
    parameters = [torch.ones(6, 3), torch.ones(4)]
    for world_size in (1, 2):
        workers = workers_of(parameters, world_size)
        for number in (0, 1):  # in the first step, and in a later one
            before = bits(snapshot(workers))
            gradients = [[torch.ones(6, 3), torch.ones(4)] for _ in workers]
            gradients[0][0] = torch.ones(6, 3).to_sparse()
            set_gradients(workers, gradients)
            with pytest.raises(NotImplementedError, match="does not take sparse gradients"):
                step_together(workers)
            assert bits(snapshot(workers)) == before
            step_with(workers, [[torch.ones(6, 3), torch.ones(4)]] * world_size)
            assert [int(o.param_groups[0]["step"]) for o in workers] == [number + 1] * world_size


def test_check_every_finds_drifted_parameters_and_lets_momenta_be() -> None:
    workers, scenario = a_run(check_every=2)
    for step in range(3):  # with local momenta that differ, of course
        step_with(workers, scenario.gradients(step))
    assert bits(momenta_of(workers[0])) != bits(momenta_of(workers[1]))
    step_with(workers, scenario.gradients(3))
    with torch.no_grad():
        parameters_of(workers[1])[1][0] += 1.0
    with pytest.raises(WorkerMismatchError, match="parameter 1 differs between workers"):
        step_with(workers, scenario.gradients(0))
