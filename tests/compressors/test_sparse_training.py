"""TopK, RandomK, RandomBlock and Identity inside Algorithm 2, with many workers."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efsgd import ErrorFeedbackSGD, NonFiniteGradientError, TensorCompressor
from efsgd.compressors.identity import Identity
from efsgd.compressors.top_k import TopK
from efsgd.randomness import generator_of
from tests.promises.sparse_reference import ALL, SHAPES, NaiveRun
from tests.simulation import (
    bits,
    errors_of,
    parameters_of,
    replicated,
    set_gradients,
    snapshot,
    step_with,
)
from tests.strategies import KINDS, assert_close, gaussian, make_gradient


def make(
    compressor: TensorCompressor,
    world_size: int = 3,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> list[ErrorFeedbackSGD]:
    workers = []
    for _ in range(world_size):
        own = [gaussian(s, 1, i).to(dtype).requires_grad_() for i, s in enumerate(SHAPES)]
        options = {"lr": 0.1, "momentum": 0.9, **options}
        workers.append(ErrorFeedbackSGD(own, compressor=compressor, **options))
    return workers


def made(kinds: list[str], step: int, world_size: int = 3, scale: float = 1.0) -> list[list[Any]]:
    return [
        [scale * make_gradient(s, kinds[i], w, 7, step, i) for i, s in enumerate(SHAPES)]
        for w in range(world_size)
    ]


GAUSSIAN = ["gaussian"] * len(SHAPES)


@pytest.mark.parametrize("compressor", ALL, ids=str)
@pytest.mark.parametrize("world_size", [1, 4])
def test_training_is_algorithm_2_with_the_definition(
    compressor: TensorCompressor, world_size: int
) -> None:
    workers, naive = make(compressor, world_size), NaiveRun(compressor, world_size)
    for step in range(6):
        gradients = made(GAUSSIAN, step, world_size)
        step_with(workers, gradients)
        naive.step(gradients)
        for w, worker in enumerate(workers):
            # Six steps of rounding in float64.
            for x, expected in zip(parameters_of(worker), naive.x, strict=True):
                assert_close(x.detach(), expected, 1e-13)
            for error, expected in zip(errors_of(worker), naive.errors[w], strict=True):
                assert_close(error, expected, 1e-13)


@settings(max_examples=40)
@given(
    compressor=st.sampled_from(ALL),
    kinds=st.lists(st.sampled_from(KINDS), min_size=len(SHAPES), max_size=len(SHAPES)),
    world_size=st.sampled_from([1, 2, 4]),
)
def test_nothing_is_lost_and_workers_stay_equal(
    compressor: TensorCompressor, kinds: list[str], world_size: int
) -> None:
    workers = make(compressor, world_size, lr=1.0, momentum=0.0, momentum_form="sgd")
    start = [p.detach().clone() for p in parameters_of(workers[0])]
    total = [torch.zeros_like(x) for x in start]
    for step in range(4):
        gradients = made(kinds, step, world_size)
        step_with(workers, gradients)
        for index, own in enumerate(zip(*gradients, strict=True)):
            total[index] += torch.stack(own).mean(0)
        assert all(replicated(worker) == replicated(workers[0]) for worker in workers)
    errors = [torch.stack(own).mean(0) for own in zip(*map(errors_of, workers), strict=True)]
    for x, first, error, wanted in zip(
        parameters_of(workers[0]), start, errors, total, strict=True
    ):
        assert_close(error + (first - x.detach()), wanted, 1e-10)


@pytest.mark.parametrize("compressor", ALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_are_as_announced_and_collectives_alike_in_all_steps(
    compressor: TensorCompressor, dtype: torch.dtype
) -> None:
    workers = make(compressor, 3, dtype)
    announced = compressor.payload_bytes(SHAPES, dtype)
    words = (len(SHAPES) + 3) * dtype.itemsize  # of each parameter and each worker
    traces = []
    for step, kinds in enumerate([GAUSSIAN, ["zero"] * len(SHAPES), ["one_hot"] * len(SHAPES)]):
        trace = step_with(workers, made(kinds, step))
        stats = workers[0].communication_stats()
        assert stats["bytes_sent"] == announced + words
        traces.append(trace[-stats["collectives"] :])
    assert traces[0] == traces[1] == traces[2]
    kinds_of = ["AllReduceMean"] if compressor.claims().averages else ["AllReduceMean", "AllGather"]
    assert [traced.kind for traced in traces[0]] == kinds_of


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_zero_in_is_zero_out_and_alive_afterwards(compressor: TensorCompressor) -> None:
    workers, fresh = make(compressor), make(compressor)
    before = snapshot(workers)[0][0]
    for step in range(2):
        step_with(workers, made(["zero"] * len(SHAPES), step))
        assert bits(parameters_of(workers[0])) == bits(before)
    for step in range(2):
        gradients = made(GAUSSIAN, step)
        step_with(workers, gradients)
        step_with(fresh, gradients)
    for x, start in zip(parameters_of(workers[0]), before, strict=True):
        assert x.numel() < 2 or not torch.equal(x, start)
    if not compressor.claims().is_random:  # where step numbers do not matter
        assert bits(parameters_of(workers[0])) == bits(parameters_of(fresh[0]))


@pytest.mark.parametrize("compressor", ALL, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_gradients_give_finite_results(
    compressor: TensorCompressor, scale: float
) -> None:
    workers = make(compressor, dtype=torch.float32)
    for step in range(3):
        step_with(workers, made(GAUSSIAN, step, scale=scale))
    for worker in workers:
        assert all(bool(x.isfinite().all()) for x in parameters_of(worker) + errors_of(worker))
    assert any(bool(error.any()) for error in errors_of(workers[0])) or compressor == Identity()


@pytest.mark.parametrize("compressor", ALL, ids=str)
@pytest.mark.parametrize("scale", [-1.0, 2.0**-20, 2.0**40])
def test_what_is_applied_scales_with_the_gradients(
    compressor: TensorCompressor, scale: float
) -> None:
    one, other = make(compressor), make(compressor)
    for step in range(3):
        step_with(one, made(GAUSSIAN, step))
        step_with(other, made(GAUSSIAN, step, scale=scale))
    for a, b in zip(one, other, strict=True):
        applied = [[w.state[p]["momentum_buffer"] for p in parameters_of(w)] for w in (a, b)]
        kept = [errors_of(w) for w in (a, b)]
        for before, after in (applied, kept):
            for x, y in zip(before, after, strict=True):
                assert torch.equal(x * scale, y)  # a power of two changes no digit


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_a_refused_step_changes_nothing(compressor: TensorCompressor) -> None:
    workers = make(compressor)
    step_with(workers, made(GAUSSIAN, 0))
    before = snapshot(workers)
    gradients = made(GAUSSIAN, 1)
    gradients[1][5][3, 4] = math.nan
    with pytest.raises(NonFiniteGradientError):
        step_with(workers, gradients)
    assert bits(snapshot(workers)) == bits(before)
    step_with(workers, made(GAUSSIAN, 1))
    assert bits(snapshot(workers)) != bits(before)


@pytest.mark.parametrize("compressor", ALL, ids=str)
def test_the_global_random_numbers_are_left_alone(compressor: TensorCompressor) -> None:
    workers = make(compressor)
    before = torch.get_rng_state()
    step_with(workers, made(GAUSSIAN, 0))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_group_has_its_own_budget() -> None:
    drawn = generator_of(0)
    xs = [torch.zeros(100, requires_grad=True) for _ in range(3)]
    groups: list[dict[str, Any]] = [
        {"params": xs[:1]},
        {"params": xs[1:2], "density": 0.5},
        {"params": xs[2:], "density": None, "rank": 1},
    ]
    optimizer = ErrorFeedbackSGD(groups, lr=1.0, momentum=0.0, compressor=TopK(density=0.05))
    for x in xs:
        x.grad = torch.randn(100, generator=drawn)
    optimizer.step()
    assert [int(x.count_nonzero()) for x in xs] == [5, 50, 100]
    optimizer.param_groups[0]["density"] = 0.25
    for x in xs:
        x.data.zero_()
        x.grad = torch.zeros(100)
    optimizer.step()
    # Momentum is 0, so that what is applied now is what was left, the 25 largest of it.
    assert [int(x.count_nonzero()) for x in xs] == [25, 50, 0]


def test_the_scope_of_a_model_is_one_group_s_settings() -> None:
    small = [torch.zeros(40, requires_grad=True), torch.zeros(5, 8, requires_grad=True)]
    large = [torch.zeros(40, requires_grad=True), torch.zeros(5, 8, requires_grad=True)]
    for factor, xs in ((1.0, small), (100.0, large)):
        for i, x in enumerate(xs):
            x.grad = factor * gaussian(tuple(x.shape), 3, i).float()
    compressor = TopK(density=0.1, scope="model")
    groups: list[dict[str, Any]] = [
        {"params": [small[0], large[0]]},
        {"params": [small[1], large[1]], "density": 0.2},
    ]
    ErrorFeedbackSGD(groups, lr=1.0, compressor=compressor).step()
    assert [int(x.count_nonzero()) for x in (*small, *large)] == [0, 0, 8, 16]


def test_identity_is_sgd_and_keeps_no_errors() -> None:
    workers = make(Identity(), momentum_form="sgd", nesterov=True)
    own = [gaussian(s, 1, i).requires_grad_() for i, s in enumerate(SHAPES)]
    sgd = torch.optim.SGD(own, lr=0.1, momentum=0.9, nesterov=True)
    for step in range(4):
        gradients = made(GAUSSIAN, step)
        step_with(workers, gradients)
        set_gradients([sgd], [[torch.stack(g).mean(0) for g in zip(*gradients, strict=True)]])
        sgd.step()
    for x, expected in zip(parameters_of(workers[0]), own, strict=True):
        assert_close(x.detach(), expected.detach(), 1e-14)  # sums in another order
        assert "error" not in workers[0].state[x]
