"""What L-GreCo sums up, when it decides, what it sends, and what it does with nothing to go by."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd.rank import Accordion, LGreCo, Uniform
from efsgd.testing import Traced
from tests.rank.l_greco_runs import (
    OPTIONS,
    SHAPES,
    Workers,
    assert_least,
    greco,
    low_rank_error,
    mean_of,
    purposes,
    sparse_greco,
)
from tests.simulation import errors_of

MATRICES = (0, 2, 3)
# At most 40 additions of float64 numbers, in another order.
ROUNDING = 1e-13


def assert_summed(workers: Workers, last: int) -> None:
    """The sums are those of the last steps of all that were taken."""
    for own, expected in zip(workers.sums, workers.summed(last), strict=True):
        assert list(own) == list(MATRICES)
        for index, found in own.items():
            scale = expected[index].abs().max()
            assert (found - expected[index]).abs().max() <= ROUNDING * scale


# ---- sums ---------------------------------------------------------------------------------------


def test_the_last_steps_of_a_window_are_summed_and_all_of_the_first() -> None:
    workers = greco(observations=3)
    # (steps of a window, how many of them are summed): with 3 of as many as the last one had.
    for length, summed in [(5, 5), (4, 2), (7, 6), (7, 3), (3, 0), (3, 3), (1, 1), (2, 2)]:
        ranks = workers.values
        workers.steps(length)
        if summed:
            assert_summed(workers, summed)
        else:
            assert not any(own.any() for sums in workers.sums for own in sums.values())
        trace = workers.decide()
        assert bool(purposes(trace)) == bool(summed)
        if not summed:
            assert workers.values == ranks
    assert any(errors.any() for errors in errors_of(workers.optimizers[0]))


def test_a_gradient_that_is_missing_counts_as_zero() -> None:
    workers = greco(steps=1)
    for missing in (0, 1):  # of one worker, so that the parameter takes part in the step
        gradients: list[list[Tensor | None]] = [[*workers.gradients(w)] for w in range(2)]
        gradients[missing][2] = None
        workers.step(gradients)
    assert_summed(workers, 3)


def test_steps_before_compression_starts_are_summed_too() -> None:
    workers = greco(steps=3, start={"start_compressing_at": 100})
    assert_summed(workers, 3)
    workers.decide()
    assert workers.values != [2, 2, 2]


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_decisions_lie_so_many_windows_apart(interval: int) -> None:
    workers = greco(interval=interval)
    for window in range(1, 3 * interval + 1):
        ranks = workers.values
        workers.steps(2)
        is_due = window % interval == 0
        assert bool(workers.sums[0]) == is_due
        assert bool(purposes(workers.decide())) == is_due
        assert is_due or workers.values == ranks
    assert workers.values != [2, 2, 2]


def test_the_end_of_a_window_is_known_where_the_one_before_was_not_looked_at() -> None:
    workers = greco(2, 1, interval=2, observations=2, steps=5)
    workers.decide()
    workers.steps(5)
    assert_summed(workers, 2)


# ---- a policy as the reference ------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2])
def test_the_ranks_of_accordion_are_what_it_is_compared_with(interval: int) -> None:
    reference = {"low": 1, "high": 3, "interval": interval}
    both = Workers(lambda: LGreCo(Accordion(**reference), spectrum="svd"), 2, SHAPES, **OPTIONS)
    accordion = Workers(lambda: Accordion(**reference), 2, SHAPES, **OPTIONS)
    lengths, ranks, seen = [16 + 12, 12 + 20, 10 + 12], range(1, 7), set()
    for scale in (1.0, 1.0, 5.0, 5.0, 5.0):
        for workers in (both, accordion):
            workers.step([[scale * g for g in workers.gradients(w)] for w in range(2)])
            workers.decide()
        means = mean_of(both.summed(1))
        errors = [{r: low_rank_error(means[index], r) for r in ranks} for index in MATRICES]
        sizes = [{r: float(r * length) for r in ranks} for length in lengths]
        assert_least(both.values, sizes, errors, accordion.values)
        seen.add(tuple(accordion.values))
    assert seen == {(3, 3, 3), (1, 1, 1)}


def test_a_fall_of_the_learning_rate_counts_between_decisions() -> None:
    reference = {"low": 1, "high": 4, "interval": 1}
    workers = Workers(lambda: LGreCo(Accordion(**reference), interval=4), 2, SHAPES, **OPTIONS)
    found = []
    for window in range(3):
        if window == 2:
            for optimizer in workers.optimizers:
                optimizer.param_groups[0]["lr"] /= 10
        workers.step()
        assert "P of accumulated gradients" not in purposes(workers.decide())
        found.append(workers.values)
    assert found == [[4, 4, 4], [1, 1, 1], [4, 4, 4]]


# ---- nothing to go by ---------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {"spectrum": "power"},
    {"spectrum": "power", "sketch": 8},
    {"spectrum": "svd"},
    {"spectrum": "svd", "gradients": "worker 0"},
    {"spectrum": "power", "gradients": "worker 0"},
    {"setting": "density"},
]


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("worker", [0, 1])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_values_stay_where_a_sum_has_overflowed(
    options: dict[str, Any], worker: int, value: float
) -> None:
    workers = sparse_greco() if "setting" in options else greco(**options)
    workers.steps(2)
    before = workers.values
    workers.sums[worker][2][3, 4] = value
    workers.decide()
    is_seen = worker == 0 or "gradients" not in options
    assert (workers.values == before) == is_seen
    workers.window(2)
    assert workers.values != before


def test_gradients_near_the_end_of_float32_decide_nothing_and_break_nothing() -> None:
    workers = sparse_greco(2, [(16, 12)], start={"lr": 1e-30, "dtype": torch.float32})
    large = torch.zeros(16, 12)
    large[0, :3] = 1e38
    for _ in range(5):
        workers.step([[large], [large]])
    assert workers.sums[0][0].isinf().any()
    workers.decide()
    assert workers.values == [0.1]


@pytest.mark.parametrize("gradient", [None, 0.0])
def test_ranks_stay_after_a_window_without_gradients(gradient: float | None) -> None:
    workers = greco(steps=3, start={"error_feedback": False})
    workers.decide()
    ranks = workers.values
    assert ranks != [2, 2, 2]
    none = [None if gradient is None else torch.zeros(shape) for shape in SHAPES]
    for _ in range(3):
        workers.step([none, none])
    workers.decide()
    assert workers.values == ranks


def test_a_layer_that_had_no_gradients_keeps_the_reference_s_rank_while_others_change() -> None:
    workers = greco()
    for _ in range(3):
        gradients = [workers.gradients(worker) for worker in range(2)]
        # One of the others is far larger, so that ranks move to it.
        workers.step([[own[0], own[1], 0 * own[2], 100 * own[3]] for own in gradients])
    workers.decide()
    assert workers.values[1] == 2 and workers.values != [2, 2, 2]


# ---- what decisions send ------------------------------------------------------------------------


def nbytes(trace: list[Traced], *words: str) -> int:
    return sum(each.nbytes for each in trace if any(word in each.purpose for word in words))


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_a_decision_by_power_iteration_sends_so_many_steps_of_the_greatest_rank(
    iterations: int,
) -> None:
    shapes = [(16, 12), (12, 20), (10, 4, 3)]
    workers = Workers(lambda: LGreCo(2, iterations=iterations, sketch=100), 2, shapes, **OPTIONS)
    trace = workers.window(2)
    factors = 4 * ((16 + 12) + (12 + 20) + (10 + 12))  # ranks are up to 4
    assert nbytes(trace, "P of acc", "Q of acc") == iterations * 8 * factors
    assert nbytes(trace, "sketches of acc") == 8 * 3 * 100
    greatest = Workers(lambda: Uniform(4), 2, shapes, **OPTIONS)
    greatest.step()
    assert nbytes(greatest.step(), "Alg. 1") >= 8 * factors  # control words ride along
    assert len(purposes(trace)) == 2 * iterations + 1


def test_layers_that_are_sent_whole_at_the_greatest_rank_send_no_more_in_a_decision() -> None:
    # Rank 3 of 16×4 has 60 numbers, less than 64; rank 4 would have 80.
    made = {"lr": 0.1, "min_compression_rate": 1.0}
    own = Workers(lambda: LGreCo(2, sketch=1, iterations=1), 2, [(16, 4)], **made)
    own.steps(2)
    assert nbytes(own.decide(), "P of acc", "Q of acc") == 8 * 3 * (16 + 4)


def test_a_decision_by_svd_sends_one_uncompressed_gradient() -> None:
    trace = greco(spectrum="svd", steps=2).decide()
    numbers = 16 * 12 + 12 * 20 + 10 * 12
    tails = 3 * (4 + 1)
    assert [each.nbytes for each in trace if "accumulated" in each.purpose] == [
        8 * numbers,
        8 * tails,
    ]
