"""L-GreCo sends least of all choices whose error is no larger than that of its reference."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    GradientAverager,
    PowerSGD,
    RandomK,
    TopK,
    UniformQuantized,
)
from efsgd.rank import Accordion, CommunicationBudget, LGreCo, Uniform, Value
from efsgd.testing.gradients import gaussian
from efsgd.testing.strategies import seeds
from tests.rank.l_greco_runs import (
    Shape,
    Workers,
    assert_least,
    low_rank_error,
    mean_of,
    missed,
    payload_bytes,
    purposes,
)

SHAPES: list[Shape] = [(16, 12), (12, 20), (10, 4, 3), (9,)]
MATRICES = SHAPES[:3]
# Singular values are roots of a float64 Gram matrix's eigenvalues. The noise in these gradients
# keeps them above 1e-3 of the largest, so their squares are right to 1e-16 / 1e-6 and better.
BY_GRAM = 1e-9

shapes = st.lists(
    st.sampled_from([(16, 12), (12, 20), (10, 4, 3), (14, 14), (6, 30)]), min_size=1, max_size=4
)


def total(means: list[torch.Tensor], ranks: list[Value]) -> float:
    return math.fsum(low_rank_error(A, r) for A, r in zip(means, ranks, strict=True))


POWERSGD: dict[str, Any] = {"lr": 0.01, "min_compression_rate": 0.0}


def options_for(compressor: Any) -> dict[str, Any]:
    return {"make": ErrorFeedbackSGD, "lr": 0.01, "compressor": compressor}


@settings(max_examples=15)
@given(shapes, st.integers(1, 4), st.integers(1, 4), seeds(), st.sampled_from(["svd", "power"]))
def test_it_sends_no_more_than_uniform_ranks_at_no_larger_error(
    own: list[Shape], world_size: int, reference: int, seed: int, spectrum: str
) -> None:
    run = world_size, own
    greco = Workers(lambda: LGreCo(reference, spectrum=spectrum), *run, seed=seed, **POWERSGD)
    uniform = Workers(lambda: Uniform(reference), *run, seed=seed, **POWERSGD)
    for workers in (greco, uniform):
        workers.window(3)
    ranks = [each.get_last_ranks() for each in greco.schedulers]
    assert all(each == ranks[0] for each in ranks)
    if spectrum == "svd":
        means = mean_of(greco.summed(3))
        assert total(means, greco.values) <= (1 + BY_GRAM) * total(means, uniform.values)
    assert greco.sent() <= uniform.sent()


@pytest.mark.parametrize("tolerance", [0.5, 0.8, 1.0, 1.5, 10.0])
@pytest.mark.parametrize("kind", [PowerSGD, LQSGD])
def test_of_all_ranks_within_the_error_those_are_chosen_that_send_least(
    kind: Any, tolerance: float
) -> None:
    compressor = kind(rank=3, min_compression_rate=0.0)
    workers = Workers(
        lambda: LGreCo(3, spectrum="svd", tolerance=tolerance), 2, SHAPES, **options_for(compressor)
    )
    workers.window(4)
    means, ranks = mean_of(workers.summed(4)), range(1, 7)
    errors = [{r: low_rank_error(A, r) for r in ranks} for A in means[:3]]
    sizes = [{r: payload_bytes(compressor, s, "rank", r) for r in ranks} for s in MATRICES]
    assert_least(workers.values, sizes, errors, [3, 3, 3], tolerance)


CASES: list[tuple[Any, list[Value], Value]] = [
    (TopK(density=0.1), [0.02, 0.05, 0.1, 0.2, 0.4], 0.1),
    (UniformQuantized(bits=4), [1, 2, 3, 4, 6, 8], 4),
    (RandomK(density=0.2, seed=1), [0.05, 0.1, 0.2, 0.5], 0.2),
]


@pytest.mark.parametrize(("compressor", "values", "reference"), CASES)
def test_densities_and_bits_are_chosen_that_send_least(
    compressor: Any, values: list[Value], reference: Value
) -> None:
    setting = "bits" if isinstance(reference, int) else "density"
    workers = Workers(
        lambda: LGreCo(reference, values, setting=setting), 2, SHAPES, **options_for(compressor)
    )
    assert workers.values == [reference] * 4
    workers.window(3)
    summed = workers.summed(3)
    errors, sizes = [], []
    for index, shape in enumerate(SHAPES):
        made = {v: dataclasses.replace(compressor, **{setting: v}) for v in values}
        errors.append({v: missed(own, index, summed) for v, own in made.items()})
        sizes.append({v: payload_bytes(compressor, shape, setting, v) for v in values})
    assert_least(workers.values, sizes, errors, [reference] * 4)
    assert len(set(workers.values)) > 1


def spectra(*values: list[float]) -> list[torch.Tensor]:
    """Matrices of 12×12 with these singular values."""
    found = []
    for index, own in enumerate(values):
        left, right = (torch.linalg.qr(gaussian((12, 12), index, i)).Q for i in range(2))
        diagonal = torch.tensor(own + [0.0] * (12 - len(own)), dtype=torch.float64, device="cpu")
        found.append(left @ torch.diag(diagonal) @ right)
    return found


@pytest.mark.parametrize("spectrum", ["svd", "power"])
def test_a_layer_of_rank_1_gets_that_and_a_flat_one_keeps_what_it_has(spectrum: str) -> None:
    own = spectra([5.0], [1.0] * 12)
    # Above 1 by more than rounding: of the first layer, 1e-8 may seem to be left.
    made = {"values": range(1, 9), "spectrum": spectrum, "tolerance": 1.001, "sketch": None}
    workers = Workers(lambda: LGreCo(4, **made), 2, [(12, 12)] * 2, **POWERSGD)
    assert workers.values == [4, 4]
    workers.step([own, own])
    workers.decide()
    assert workers.values == [1, 4]


def test_by_default_ranks_are_from_half_to_twice_the_reference() -> None:
    assert list(LGreCo(4).values) == [2, 3, 4, 5, 6, 7, 8]
    assert list(LGreCo(1).values) == [1, 2]
    assert list(LGreCo(3, shrink=0.3, grow=1.0).values) == [1, 2, 3]
    assert list(LGreCo(5, shrink=1.0, grow=1.5).values) == [5, 6, 7, 8]
    assert list(LGreCo(Accordion(2, 5)).values) == list(range(1, 11))
    assert list(LGreCo(2, values=[8, 2, 1, 2]).values) == [1, 2, 8]


@pytest.mark.parametrize("tolerance", [1e-6, 0.5])
def test_where_no_ranks_are_good_enough_the_best_are_taken(tolerance: float) -> None:
    flat = spectra([1.0] * 12, [1.0] * 12)
    made = {"values": [2, 3], "tolerance": tolerance, "spectrum": "svd"}
    workers = Workers(lambda: LGreCo(2, **made), 1, [(12, 12)] * 2, **POWERSGD)
    workers.step([flat])
    workers.decide()
    assert workers.values == [3, 3]


def test_layers_that_are_sent_whole_at_a_value_have_no_error_there() -> None:
    # 12·12 numbers are no more than 6·(12 + 12), so at rank 6 the matrix itself is sent.
    (flat,) = spectra([1.0] * 12)
    workers = Workers(
        lambda: LGreCo(2, values=[2, 5, 6, 12], spectrum="svd", tolerance=0.1),
        1,
        [(12, 12)],
        lr=0.01,
        min_compression_rate=1.0,
    )
    workers.step([[flat]])
    workers.decide()
    assert workers.values == [6]


def test_parameters_that_are_never_compressed_are_left_alone() -> None:
    workers = Workers(lambda: LGreCo(2), 2, [(9,), (16, 12), ()], **POWERSGD)
    workers.window(2)
    assert list(workers.schedulers[0].get_last_ranks()) == ["parameter 1"]


@pytest.mark.parametrize("spectrum", ["svd", "power"])
def test_worker_0_may_decide_by_its_own_gradients(spectrum: str) -> None:
    run: Any = {"gradients": "worker 0", "spectrum": spectrum, "sketch": None}
    workers = Workers(lambda: LGreCo(3, **run), 3, MATRICES, **POWERSGD)
    alone = Workers(lambda: LGreCo(3, spectrum=spectrum, sketch=None), 1, MATRICES, **POWERSGD)
    # One step, after which errors would differ, since means do.
    own = [[(1 + 9 * w) * g.flip(-1) ** (1 + w) for g in workers.gradients(w)] for w in range(3)]
    workers.step(own)
    alone.step(own[:1])
    trace = workers.decide()
    alone.decide()
    assert purposes(trace) == ["errors of accumulated gradients"]
    assert workers.values == alone.values != [3, 3, 3]


def test_an_averager_s_ranks_are_chosen_as_an_optimizer_s() -> None:
    options: Any = {"compressor": PowerSGD(rank=3, min_compression_rate=0.0)}
    averagers = Workers(lambda: LGreCo(3), 2, SHAPES, GradientAverager, lr=None, **options)
    optimizers = Workers(lambda: LGreCo(3), 2, SHAPES, ErrorFeedbackSGD, lr=0.1, **options)
    for workers in (averagers, optimizers):
        workers.window(3)
    assert averagers.values == optimizers.values != [3, 3, 3]


# ---- budgets as references ----------------------------------------------------------------------


def test_a_budget_in_bytes_may_be_the_reference() -> None:
    def budget() -> CommunicationBudget:
        return CommunicationBudget(bytes_per_step=3000, max_rank=4)

    shapes = [*MATRICES, (200,)]  # of a vector 1600 bytes are sent, whatever the ranks are
    alone = Workers(budget, 1, shapes, **POWERSGD)
    workers = Workers(lambda: LGreCo(budget(), spectrum="svd"), 1, shapes, **POWERSGD)
    before = workers.values
    assert before == alone.values
    workers.window(3)
    means = mean_of(workers.summed(3))
    assert total(means[:3], workers.values) <= (1 + BY_GRAM) * total(means[:3], before)
    assert workers.sent() <= 3000
    policy: Any = workers.schedulers[0].policy
    assert policy.reference.background is policy.background


def test_a_budget_in_time_may_be_the_reference() -> None:
    clock = itertools.count().__next__

    def policy() -> LGreCo:
        return LGreCo(CommunicationBudget(share_of_step=0.5, max_rank=3, interval=1, clock=clock))

    workers = Workers(policy, 1, MATRICES, **{**POWERSGD, "rank": 9})
    workers.step()
    workers.decide()  # of one step no time is known, and rank 9 is none of the values
    assert workers.values == [9, 9, 9]
    workers.window(3)
    budget: Any = workers.schedulers[0].policy
    assert budget.reference.step_seconds == 1.0
    assert all(1 <= rank <= 6 for rank in workers.values)
