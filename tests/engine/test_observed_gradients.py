"""What rank schedulers see: gradients of steps that are applied, in units of the loss.

Sums are compared bit by bit: gradients here are small multiples of powers of two.
"""

import contextlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd import ErrorFeedbackSGD, GradientAverager, NonFiniteGradientError, PowerSGDOptimizer
from efsgd.compressors import TopK
from efsgd.rank import Accordion, RankScheduler
from tests.rank.rank_runs import SQUARE, Team, individual, of_norm
from tests.simulation import parameters_of


def watched(
    parameters: Any, make: Any = PowerSGDOptimizer, **options: Any
) -> tuple[Any, RankScheduler]:
    """An optimizer and a scheduler that decides after each window."""
    optimizer = make(parameters, **{"lr": 0.5, **options})
    return optimizer, RankScheduler(optimizer, Accordion(1, 4, interval=1))


def sums(scheduler: RankScheduler) -> dict[int, Tensor]:
    """What was summed up since the window began."""
    return scheduler.policy.accumulators[0].sums


def steps(scheduler: RankScheduler) -> int:
    """How many steps were added."""
    return scheduler.policy.accumulators[0].steps


def step_with(optimizer: Any, *gradients: float | complex | Tensor | None) -> None:
    """Steps with these gradients, of which numbers are those of all elements."""
    for parameter, given in zip(parameters_of(optimizer), gradients, strict=True):
        is_number = isinstance(given, int | float | complex)
        parameter.grad = torch.full_like(parameter.detach(), given) if is_number else given
    optimizer.step()


def test_sums_begin_anew_with_each_window_that_counts() -> None:
    parameter = torch.zeros(SQUARE, requires_grad=True)
    optimizer = PowerSGDOptimizer([parameter], lr=0.1)
    scheduler = RankScheduler(optimizer, Accordion(1, 4, interval=2))
    for window in range(4):
        for step in range(3):
            step_with(optimizer, 2.0**step)
        if window % 2 == 0:
            assert sums(scheduler)[0].equal(torch.full(SQUARE, 7.0))
            assert steps(scheduler) == 3
        else:
            assert sums(scheduler) == {}
            assert steps(scheduler) == 0
        scheduler.step()


def test_gradients_count_as_they_are_weighted() -> None:
    parameter = torch.zeros(SQUARE, requires_grad=True)
    optimizer, scheduler = watched([parameter])
    for weight in (1.0, 0.5, 0.0):
        optimizer.weight = weight
        step_with(optimizer, 4.0)
    assert sums(scheduler)[0].equal(torch.full(SQUARE, 6.0))


@pytest.mark.parametrize("unscales", [False, True])
def test_gradients_count_in_units_of_the_loss_and_skipped_steps_do_not(unscales: bool) -> None:
    parameter = torch.zeros(SQUARE, requires_grad=True)
    optimizer, scheduler = watched([parameter])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, math.inf, 2.0):  # the second one halves the scale
        optimizer.zero_grad()
        scaler.scale(factor * parameter.sum()).backward()
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0
    assert sums(scheduler)[0].equal(torch.full(SQUARE, 3.0))
    assert steps(scheduler) == 2


def test_an_averager_s_gradients_count_before_they_are_replaced() -> None:
    parameter = torch.zeros(SQUARE, requires_grad=True)
    averager = GradientAverager([parameter])
    with pytest.warns(UserWarning, match="knows no learning rates"):
        scheduler = RankScheduler(averager, Accordion(1, 4, interval=1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    own = torch.eye(16)
    scaler.scale((parameter * own).sum()).backward()
    averager.average_(scaler)
    assert not parameter.grad.equal(8 * own)
    assert sums(scheduler)[0].equal(own)


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_step_that_is_not_applied_is_not_seen(nonfinite: str) -> None:
    parameters = [torch.zeros(SQUARE, requires_grad=True) for _ in range(2)]
    optimizer, scheduler = watched(parameters, nonfinite=nonfinite)
    for bad in (False, True, False):
        raises = pytest.raises(NonFiniteGradientError)
        with raises if bad and nonfinite == "raise" else contextlib.nullcontext():
            step_with(optimizer, 4.0, math.nan if bad else 1.0)
    assert sums(scheduler)[0].equal(torch.full(SQUARE, 8.0))
    assert steps(scheduler) == 2


def test_a_worker_without_a_gradient_adds_nothing_to_the_mean() -> None:
    team = Team(lambda: Accordion(1, 4, interval=1), 2, [SQUARE, SQUARE])
    decided = []
    four, two = of_norm(4), of_norm(2)
    for gradients in ([[four, four], [four, four]], [[four, four], [None, four]],
                      [[None, four], [two, two]], [[None, four], [None, two]]):  # fmt: skip
        team.step(gradients)
        team.decide()
        decided.append(team.ranks)
    # The first layer's norms are 4, 2, 1, and 0 where nobody has a gradient.
    assert decided == [[4, 4], [4, 1], [4, 1], [4, 1]]


def test_a_group_that_is_added_has_its_own_rank_up_to_the_next_decision() -> None:
    first, second = (torch.zeros(SQUARE, requires_grad=True) for _ in range(2))
    optimizer = PowerSGDOptimizer([first], lr=0.5, rank=3)
    scheduler = RankScheduler(optimizer, Accordion(1, 4, interval=2))
    decided = []
    for window in range(5):
        if window == 1:
            optimizer.add_param_group({"params": [second]})
        step_with(optimizer, *[1.0] * len(optimizer.param_groups))
        scheduler.step()
        decided.append(list(scheduler.get_last_ranks().values()))
    # It is first seen in window 2, and compared with that in window 4.
    assert decided == [[4], [4, 3], [1, 4], [1, 4], [1, 1]]


def test_a_group_that_is_added_while_gradients_are_summed_has_the_high_rank() -> None:
    first, second = (torch.zeros(SQUARE, requires_grad=True) for _ in range(2))
    optimizer, scheduler = watched([first], rank=3)
    decided = []
    for window in range(4):
        for step in range(2):
            if (window, step) == (1, 1):
                optimizer.add_param_group({"params": [second]})
            step_with(optimizer, *[1.0] * len(optimizer.param_groups))
        scheduler.step()
        decided.append(list(scheduler.get_last_ranks().values()))
    assert decided == [[4], [1, 4], [1, 4], [1, 1]]


def test_a_parameter_that_is_frozen_and_thawed_has_the_high_rank() -> None:
    frozen, other = (torch.zeros(SQUARE, requires_grad=True) for _ in range(2))
    optimizer, scheduler = watched([frozen, other])
    decided = []
    for is_frozen in (False, False, True, True, False, False):
        frozen.requires_grad_(not is_frozen)
        step_with(optimizer, None if is_frozen else 1.0, 1.0)
        scheduler.step()
        decided.append(individual(optimizer))
    assert decided == [[4, 4], [1, 1], [4, 1], [4, 1], [4, 1], [1, 1]]


def test_sparse_gradients_are_not_seen() -> None:
    embedding = torch.nn.Embedding(32, 16, sparse=True)
    linear = torch.nn.Linear(16, 16, bias=False)
    optimizer, scheduler = watched([*embedding.parameters(), *linear.parameters()])
    for _ in range(2):
        optimizer.zero_grad()
        linear(embedding(torch.arange(4))).sum().backward()
        optimizer.step()
    assert not sums(scheduler)[0].any()
    assert sums(scheduler)[1].any()
    scheduler.step()
    assert individual(optimizer) == [4, 4]


def test_sums_have_more_digits_than_bfloat16_parameters() -> None:
    parameter = torch.zeros(SQUARE, dtype=torch.bfloat16, requires_grad=True)
    optimizer, scheduler = watched([parameter])
    for gradient in (1.0, 2.0**-10):
        step_with(optimizer, gradient)
    assert sums(scheduler)[0].equal(torch.full(SQUARE, 1 + 2.0**-10))


def test_a_complex_parameter_has_the_norm_of_both_its_parts() -> None:
    parameter = torch.zeros(SQUARE, dtype=torch.complex64, requires_grad=True)
    optimizer, scheduler = watched([parameter])
    decided = []
    # The elements' magnitudes are 1, 1 and 1/4. The real part alone would tell something else.
    for gradient in (1.0 + 0.0j, 0.0 + 1.0j, 0.25 + 0.0j):
        step_with(optimizer, gradient)
        scheduler.step()
        decided += individual(optimizer)
    assert decided == [4, 1, 4]


def test_vectors_of_any_shape_count_where_they_are_compressed() -> None:
    shapes, dtypes = [(2,), (40,), (7,)], [torch.float32, torch.float64, torch.complex64]
    pairs = list(zip(shapes, dtypes, strict=True))
    parameters = [torch.zeros(s, dtype=d, requires_grad=True) for s, d in pairs]
    optimizer = ErrorFeedbackSGD(parameters, lr=0.5, compressor=TopK(density=0.5))
    policy = Accordion(0.25, 0.5, interval=1, setting="density")
    scheduler = RankScheduler(optimizer, policy)
    step_with(optimizer, 2.0, 2.0, 2.0)
    found = sums(scheduler)
    assert [tuple(found[index].shape) for index in sorted(found)] == [(2,), (40,), (14,)]
    squares = {index: float(value.square().sum()) for index, value in found.items()}
    assert squares == {0: 8.0, 1: 160.0, 2: 28.0}


def test_empty_parameters_are_left_alone() -> None:
    parameters = [torch.zeros(shape, requires_grad=True) for shape in ((0, 8), SQUARE, (3, 0, 2))]
    optimizer, scheduler = watched(parameters)
    for _ in range(2):
        step_with(optimizer, 1.0, 1.0, 1.0)
        scheduler.step()
    assert individual(optimizer) == [None, 1, None]


def test_parameters_of_two_dtypes_are_seen_in_two_parts_of_one_step() -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float64)
    parameters = [torch.zeros(SQUARE, dtype=dtype, requires_grad=True) for dtype in dtypes]
    optimizer, scheduler = watched(parameters)
    decided = []
    for norms in ((4, 4, 4, 4), (4, 1, 4, 1)):
        for _ in range(3):
            step_with(optimizer, *(of_norm(n).to(d) for n, d in zip(norms, dtypes, strict=True)))
        assert steps(scheduler) == 3
        wide = [torch.float64, torch.float32, torch.float32, torch.float64]
        assert {index: value.dtype for index, value in sums(scheduler).items()} == dict(
            enumerate(wide)
        )
        scheduler.step()
        decided.append(individual(optimizer))
    assert decided == [[4, 4, 4, 4], [1, 4, 1, 4]]


def test_sums_are_apart_from_gradients_and_from_what_was_saved() -> None:
    parameter = torch.zeros(SQUARE, requires_grad=True)
    optimizer, scheduler = watched([parameter])
    step_with(optimizer, 1.0)
    saved = scheduler.state_dict()
    parameter.grad.fill_(5.0)
    assert sums(scheduler)[0].equal(torch.ones(SQUARE))
    optimizer.step()
    assert saved["sums"][0]["sums"][0].equal(torch.ones(SQUARE))
