"""PowerSGD in one all-reduce per step: what alternates, what is sent, what is kept."""

import math
from typing import Any

import pytest
import torch

from efsgd import NonFiniteGradientError, PowerSGD
from efsgd.algorithms.alternating import initial_left
from tests.algorithms.runs import SHAPES
from tests.algorithms.runs import a_run as a_run_of
from tests.promises.test_nothing_is_lost import Balance
from tests.simulation import (
    bits,
    difference,
    make_workers,
    parameters_of,
    snapshot,
    step_with,
    train,
)
from tests.strategies import Scenario, gaussian


def a_run(**options: Any) -> tuple[list[Any], Scenario]:
    return a_run_of(PowerSGD(rank=2, alternating=True), **options)


@pytest.mark.parametrize("seed", range(3))
def test_repetition_finds_the_best_approximation(seed: int) -> None:
    left = torch.linalg.qr(gaussian((12, 8), seed, 1)).Q
    right = torch.linalg.qr(gaussian((8, 8), seed, 2)).Q
    values = 2.0 ** -torch.arange(8, dtype=torch.float64)
    matrix = (left * values) @ right.mT
    best = (left[:, :2] * values[:2]) @ right[:, :2].mT
    workers = make_workers(
        [torch.zeros(12, 8).double()], 1, lr=1.0, momentum_form="sgd", rank=2, alternating=True,
        error_feedback=False,
    )  # fmt: skip
    for _ in range(60):  # the subspace converges by a factor of 2 in each
        before = parameters_of(workers[0])[0].detach().clone()
        step_with(workers, [[matrix]])
    update = before - parameters_of(workers[0])[0].detach()
    assert difference(update, best) < 1e-11


# ---- what is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1])
def test_one_all_reduce_carries_all_and_is_as_long_as_announced(start: int) -> None:
    workers, scenario = a_run(start_compressing_at=start)
    compressor = PowerSGD(rank=2, alternating=True)
    words = 8 * (len(SHAPES) + len(workers))
    missing = [[None] * 4] * 3
    for step in range(7):
        trace = step_with(workers, missing if step > 4 else scenario.gradients(step))
        own = [traced for traced in trace if traced.kind == "AllReduceMean"]
        assert len(own) == 1 and len(trace) == (1 if step > start + 1 else len(trace))
        if step >= start:
            announced = compressor.payload_bytes(SHAPES, torch.float64, step - start)
            # Of three matrices r n, or r m; and a vector.
            is_even = (step - start) % 2 == 0
            expected = 8 + 2 * (9 + 9 + 4 if is_even else 8 + 8 + 27)
            assert own[0].nbytes == announced + words == 8 * expected + words


# ---- settings and state --------------------------------------------------------------------------


def test_the_state_has_both_factors_which_a_new_rank_keeps() -> None:
    workers, scenario = a_run()
    train(scenario, range(3), workers)
    before = {k: workers[0].state[parameters_of(workers[0])[0]][k].clone() for k in ("p", "q")}
    assert before["p"].shape == (9, 2) and before["q"].shape == (8, 2)
    for optimizer in workers:
        optimizer.param_groups[0]["rank"] = 3
    step_with(workers, scenario.gradients(3))  # from the left: P stays, but for its new column
    p = workers[0].state[parameters_of(workers[0])[0]]["p"]
    assert torch.equal(p[:, :2], before["p"])
    # What is new has the direction that was drawn, and another length. Two quotients in float64.
    drawn = initial_left(0, 0, 9, 3)[:, 2]
    assert difference(p[:, 2] / p[:, 2].norm(), drawn / drawn.norm()) < 1e-15


def test_changing_the_form_loses_nothing() -> None:
    workers, scenario = a_run()
    balance = Balance(workers)
    for step in range(8):
        for optimizer in workers:
            optimizer.param_groups[0]["alternating"] = step not in (2, 3, 4)
        balance.step(workers, scenario.gradients(step))


# ---- zeros ---------------------------------------------------------------------------------------


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
