"""PowerSGD in one all-reduce per step keeps every promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efsgd import CollectiveError, NonFiniteGradientError, WorkerMismatchError
from tests.algorithms.alternating_runs import LR, PLAIN, a_run, workers_of
from tests.promises.test_nothing_is_lost import Balance
from tests.simulation import (
    bits,
    difference,
    make_workers,
    parameters_of,
    replicated,
    snapshot,
    step_with,
)
from tests.strategies import KINDS, Scenario, gaussian, make_gradient, scenarios, seeds


@settings(max_examples=40)
@given(scenarios(max_steps=5, **PLAIN))
def test_nothing_is_lost_and_workers_stay_equal(scenario: Scenario) -> None:
    workers = workers_of(scenario)
    balance = Balance(workers)
    for step in range(scenario.steps):
        balance.step(workers, scenario.gradients(step))
        assert all(replicated(other) == replicated(workers[0]) for other in workers[1:])


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS), n=st.integers(1, 12), m=st.integers(1, 12),
    rank=st.integers(1, 6), seed=seeds(), exponent=st.integers(-100, 100),
)  # fmt: skip
def test_a_power_of_two_scales_everything_to_the_bit(
    kind: str, n: int, m: int, rank: int, seed: int, exponent: int
) -> None:
    gradients = [make_gradient((n, m), kind, w, seed).float() for w in range(2)]
    results = []
    for scale in (1.0, 2.0**exponent):
        workers = make_workers(
            [torch.zeros(n, m)], 2, lr=0.5, momentum_form="sgd", rank=rank, alternating=True,
            min_compression_rate=0.0,
        )  # fmt: skip
        for _ in range(4):
            step_with(workers, [[g * scale] for g in gradients])
        results.append(parameters_of(workers[0])[0].detach() / scale)
    assert results[0].isfinite().all()
    # At the small end what should be zero may end in a subnormal number, with fewer digits.
    assert difference(*results) <= (2.0**-40 if exponent < -60 else 0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_and_huge_gradients_are_finite(kind: str, scale: float) -> None:
    workers = make_workers([torch.zeros(10, 8)], 2, lr=1e-3, rank=2, alternating=True)
    for _ in range(4):
        step_with(workers, [[scale * make_gradient((10, 8), kind, w, 4).float()] for w in range(2)])
    assert parameters_of(workers[0])[0].isfinite().all()
    assert bool(parameters_of(workers[0])[0].any()) == (kind != "zero")


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("dead", [1, 2, 5])
def test_a_layer_that_was_dead_learns_again(rank: int, dead: int) -> None:
    # One matrix is dead for a while, its twin in the same batch is not.
    target = gaussian((2, 9, 8), 5).float()
    workers = make_workers(
        [torch.zeros(9, 8), torch.zeros(9, 8)], 2, lr=0.1, rank=rank, momentum_form="sgd",
        alternating=True, min_compression_rate=0.0,
    )  # fmt: skip
    initial = {k: workers[0].state[parameters_of(workers[0])[0]][k].clone() for k in ("p", "q")}
    for step in range(dead + 250):
        now = [p.detach() - t for p, t in zip(parameters_of(workers[0]), target, strict=True)]
        if step < dead:
            now[0] = torch.zeros(9, 8)
        step_with(workers, [now, now])
        if step < dead:
            state = workers[0].state[parameters_of(workers[0])[0]]
            assert all(torch.equal(state[name], value) for name, value in initial.items())
    for p, t in zip(parameters_of(workers[0]), target, strict=True):
        # 250 steps on a quadratic that shrinks by 0.9 where it is seen.
        assert (p - t).norm() < 0.05 * t.norm()


def test_a_column_of_zeros_keeps_what_it_was_and_zeros_within_a_column_do_not() -> None:
    workers = make_workers([torch.zeros(9, 8)], 2, lr=0.1, rank=2, alternating=True)
    states = [optimizer.state[parameters_of(optimizer)[0]] for optimizer in workers]
    column = torch.tensor([0.0, 1, 2, 3, 4, 0, 0, 0, 0])
    for state in states:
        state["q"] = torch.eye(8, 2)  # of M it takes the first two columns
    kept = states[0]["p"][:, 1].clone()
    step_with(workers, [[torch.outer(column, torch.eye(8)[0])]] * 2)
    assert torch.equal(states[0]["p"], torch.stack([column, kept], dim=1))
    for state in states:
        state["p"] = torch.eye(9, 2)  # and the first two rows
    row, kept = column[:8], states[0]["q"][:, 1].clone()
    step_with(workers, [[torch.outer(torch.eye(9)[0], row)]] * 2)
    assert torch.equal(states[0]["q"], torch.stack([row, kept], dim=1))


def test_a_parameter_without_gradient_keeps_both_factors() -> None:
    workers, scenario = a_run()
    for step in range(4):
        gradients = scenario.gradients(step)
        if step >= 2:  # one step of either side
            gradients = [[None, *own[1:]] for own in gradients]
            before = bits(dict(workers[0].state[parameters_of(workers[0])[0]]))
        step_with(workers, gradients)
        if step >= 2:
            assert bits(dict(workers[0].state[parameters_of(workers[0])[0]])) == before


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_that_fails_changes_nothing_and_keeps_its_side(step: int) -> None:
    workers, scenario = a_run()
    twins, _ = a_run()
    for optimizers in (workers, twins):
        for number in range(step + 1):
            step_with(optimizers, scenario.gradients(number))
    before = bits(snapshot(workers))
    with pytest.raises(CollectiveError):
        step_with(workers, scenario.gradients(5), fail_at=0)
    assert bits(snapshot(workers)) == before
    for number in (5, 6, 7):
        step_with(workers, scenario.gradients(number))
        step_with(twins, scenario.gradients(number))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


@pytest.mark.parametrize("steps", [4, 5])
def test_what_one_worker_changes_is_an_error_on_all_on_either_side(steps: int) -> None:
    workers, scenario = a_run()
    for step in range(steps):
        step_with(workers, scenario.gradients(step))
    workers[1].param_groups[0]["rank"] = 1
    with pytest.raises(WorkerMismatchError, match="worker 1 has changed"):
        step_with(workers, scenario.gradients(steps))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_bad_gradient_shows_even_where_it_is_multiplied_by_zero(side: str, value: float) -> None:
    for rows in range(6):
        workers = make_workers([torch.zeros(6, 7)], 2, lr=0.1, rank=1, alternating=True)
        if side == "left":
            step_with(workers, [[gaussian((6, 7), 1, w).float()] for w in range(2)])
        for optimizer in workers:
            state = optimizer.state[parameters_of(optimizer)[0]]
            for name in ("p", "q"):
                state[name] = torch.zeros_like(state[name])
                state[name][0] = 1.0
        before = bits(snapshot(workers))
        bad = gaussian((6, 7), 2).float()
        bad[rows, rows + 1] = value  # of the columns only the first is multiplied by anything
        with pytest.raises(NonFiniteGradientError, match="worker 1 the gradient of parameter 0"):
            step_with(workers, [[gaussian((6, 7), 3).float()], [bad]])
        assert bits(snapshot(workers)) == before


def test_an_overflow_is_noticed_by_all() -> None:
    workers = make_workers([torch.zeros(64, 64)], 2, lr=0.1, rank=1, alternating=True)
    state = workers[0].state[parameters_of(workers[0])[0]]["q"]
    huge = 3e38 * state.sign().mT.expand(64, 64).float()
    with pytest.raises(NonFiniteGradientError, match="overflow"):
        step_with(workers, [[huge], [huge]])
    assert not parameters_of(workers[0])[0].any()


@pytest.mark.parametrize("step", [0, 1])
def test_the_norm_of_an_update_is_told(step: int) -> None:
    workers, scenario = a_run(max_grad_norm=math.inf, momentum_form="sgd", lr=LR)
    for number in range(step + 1):
        before = [p.detach().clone() for p in parameters_of(workers[0])]
        step_with(workers, scenario.gradients(number))
    moved = [a - b.detach() for a, b in zip(before, parameters_of(workers[0]), strict=True)]
    norm = math.sqrt(sum(float(m.square().sum()) for m in moved)) / LR
    assert workers[0].communication_stats()["grad_norm"] == pytest.approx(norm, rel=1e-12)
