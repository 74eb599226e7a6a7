"""Norms of means over workers from sketches: exact where they can be, else without bias."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd.rank.approximation import sketch as room
from efsgd.rank.approximation.sketch import mean_norms, sketch
from efsgd.testing import Lockstep, lockstep
from tests.strategies import gaussian


def run(workers: Sequence[Sequence[Tensor]], size: int | None) -> Lockstep[list[float]]:
    return lockstep([mean_norms(own, size, seed=0) for own in workers])


@given(st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(1, 4), st.integers(0, 99))
def test_whole_gradients_give_the_norms_of_the_means(
    sizes: list[int], world_size: int, seed: int
) -> None:
    workers = [
        [gaussian((size,), seed, worker, size, index) for index, size in enumerate(sizes)]
        for worker in range(world_size)
    ]
    for size in (None, 300):
        found = run(workers, size)
        for index in range(len(sizes)):
            mean = torch.stack([own[index] for own in workers]).mean(0)
            # Sums of at most 300 squares in another order: their rounding is below 300 · 2^-53.
            assert found.results[0][index] == pytest.approx(float(mean.norm()), rel=1e-13)
        assert all(norms == found.results[0] for norms in found.results)
        assert [traced.shape for traced in found.trace] == [(sum(sizes),)]


def test_the_squared_norm_is_unbiased_and_spreads_as_promised() -> None:
    tensor, size, seeds = gaussian((3000,), 1).abs(), 64, 1000  # of one sign, for the worst
    ratios = torch.tensor(
        [float(sketch(tensor, size, seed).norm() / tensor.norm()) for seed in range(seeds)],
        dtype=torch.float64,
    )
    spread = math.sqrt(2 / size)
    # The mean of 1000 has a standard deviation of 0.0056: four of them are exceeded by chance once
    # in 16,000. That of the spread itself is about 1 / √2000 of it, 2 %; four of them are 9 %.
    assert abs(float(ratios.square().mean()) - 1) < 4 * spread / math.sqrt(seeds)
    assert float(ratios.square().std()) == pytest.approx(spread, rel=0.15)
    assert float(ratios.std()) == pytest.approx(1 / math.sqrt(2 * size), rel=0.15)


def test_one_large_element_does_not_spread_at_all() -> None:
    tensor = torch.zeros(5000)
    tensor[1234] = -3.0
    assert all(float(sketch(tensor, 16, seed).norm()) == 3.0 for seed in range(20))


@given(st.integers(2, 4), st.integers(0, 99))
def test_the_sketch_of_the_mean_is_the_mean_of_the_sketches(workers: int, seed: int) -> None:
    tensors = [gaussian((40, 50), seed, worker) for worker in range(workers)]
    mean = torch.stack(tensors).mean(0)
    sketches = torch.stack([sketch(each, 128, seed) for each in tensors])
    # Each bucket adds up about 16 numbers of size 1, in another order: rounding is below 1e-14.
    assert torch.allclose(sketches.mean(0), sketch(mean, 128, seed), rtol=0, atol=1e-13)


def test_a_sketch_is_the_same_however_many_elements_are_drawn_for_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = torch.ones(999)
    monkeypatch.setattr(room, "_AT_ONCE", 100)
    parts = [sketch(tensor[:100], 16, 7), sketch(tensor, 16, 7)]
    assert not parts[0].equal(parts[1])
    assert float(parts[1].sum()) % 2 == 1  # of 999 signs each has come in once


def test_layers_are_sketched_by_choices_of_their_own() -> None:
    tensor = gaussian((3000,), 5)
    first, second = run([[tensor, tensor]], 64).results[0]
    assert first != second


def test_small_tensors_are_sent_whole_and_large_ones_in_as_many_numbers_as_asked_for() -> None:
    found = run([[torch.ones(10), torch.ones(3, 100, dtype=torch.float64)]], 64)
    assert [(traced.shape, traced.dtype) for traced in found.trace] == [((74,), torch.float64)]
    assert found.results[0][0] == pytest.approx(math.sqrt(10), rel=1e-15)


def test_without_tensors_nothing_is_sent() -> None:
    assert run([[], []], 64) == Lockstep([[], []], [])


def test_tensors_stay_what_they_are_and_the_global_generator_is_not_touched() -> None:
    tensors = [torch.ones(10), torch.ones(500)]
    state = torch.get_rng_state()
    for size in (None, 4, 64):
        run([tensors, [-tensor for tensor in tensors]], size)
    assert torch.get_rng_state().equal(state)
    assert all(bool((tensor == 1).all()) for tensor in tensors)
