"""Which atoms are drawn how often: by their definition, and over all draws there are."""

import itertools
import math
from collections.abc import Iterator

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efsgd.compressors.spectral_atomo import draw_until, inclusion_probabilities, systematic_sample
from efsgd.randomness import generator_of
from efsgd.testing.strategies import seeds


def water_filling(values: list[float], count: int) -> list[float]:
    """By its definition, one atom after the other: the largest is sure where its share is above 1,
    and then the rest is shared out among the others."""
    if count == 0 or not values:
        return [0.0] * len(values)
    total = math.fsum(values)
    if count * values[0] >= total:
        return [1.0, *water_filling(values[1:], count - 1)]
    return [count * value / total for value in values]


def second_moment(values: Tensor, probabilities: Tensor) -> float:
    """Of an estimate that has atom i, of length σ / p, with probability p."""
    return float((values.square() / probabilities)[values > 0].sum())


def exactly(probabilities: Tensor) -> Iterator[tuple[float, float]]:
    """All draws that differ: for each interval of equal samples a draw from it, and its length.

    A sample changes where a tooth of the comb passes from one atom to the next."""
    edges = sorted({0.0, 1.0, *(float(bound) % 1.0 for bound in probabilities.cumsum(0))})
    for first, end in itertools.pairwise(edges):
        if end - first > 1e-13:  # others come of rounding
            yield (first + end) / 2, end - first


@st.composite
def spectra(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Singular values in descending order, and the size of a sample of them."""
    size = draw(st.integers(1, 9))
    decay = draw(st.sampled_from([0.0, 0.3, 2.0, 9.0]))
    values = torch.rand(size, dtype=torch.float64, generator=generator_of(draw(seeds())))
    values *= torch.exp(-decay * torch.arange(size))
    values[size - draw(st.integers(0, size)) :] = 0.0
    return values.sort(descending=True).values, draw(st.integers(1, size))


@settings(max_examples=200)
@given(spectra())
def test_probabilities_are_those_of_water_filling(drawn: tuple[Tensor, int]) -> None:
    values, count = drawn
    found = inclusion_probabilities(values, count)
    positive = int(values.count_nonzero())
    expected = torch.tensor(water_filling(values.tolist(), count), dtype=torch.float64)
    assert bool(((found - expected)[:positive].abs() <= 1e-12).all())
    assert abs(float(found.sum()) - count) <= 1e-12
    assert bool(((found >= 0) & (found <= 1)).all())
    if positive <= count:
        assert bool((found[:positive] == 1).all())


@settings(max_examples=50)
@given(spectra(), seeds())
def test_no_other_probabilities_have_a_smaller_second_moment(
    drawn: tuple[Tensor, int], seed: int
) -> None:
    values, count = drawn
    best = second_moment(values, inclusion_probabilities(values, count))
    for number in range(5):
        other = torch.rand(len(values), dtype=torch.float64, generator=generator_of(seed, number))
        for _ in range(50):  # to a sum of at most `count`
            other = (other * count / other.sum()).clamp(max=1.0)
        assert second_moment(values, other) >= best * (1 - 1e-12)


@settings(max_examples=200)
@given(spectra())
def test_each_atom_is_in_the_sample_as_often_as_it_should(drawn: tuple[Tensor, int]) -> None:
    values, count = drawn
    probabilities = inclusion_probabilities(values, count)
    found = torch.zeros_like(values)
    for draw, length in exactly(probabilities):
        sample = systematic_sample(probabilities, count, draw)
        assert sample.tolist() == sorted(set(sample.tolist()))
        assert len(sample) == count
        found[sample] += length
    assert float((found - probabilities).abs().max()) <= 1e-12


def test_the_ends_of_the_draw_are_samples_like_others() -> None:
    for probabilities in ([1.0, 1.0, 1.0], [1.0, 0.7, 0.7, 0.6], [0.1] * 10 + [0.0]):
        p = torch.tensor(probabilities, dtype=torch.float64)
        count = round(float(p.sum()))
        for draw in (0.0, 1 - 2.0**-53):
            sample = systematic_sample(p, count, draw)
            assert len(set(sample.tolist())) == count
            assert bool((p[sample] > 0).all())


def test_rejection_draws_subsets_as_often_as_it_should() -> None:
    """Of 20000, each frequency within 6 standard errors, which by chance one in 5e8 is not."""
    p, count, many = torch.tensor([0.9, 0.6, 0.3, 0.2]).double(), 2, 20_000
    weights = {
        subset: math.prod(float(q) if i in subset else 1 - float(q) for i, q in enumerate(p))
        for subset in itertools.combinations(range(4), count)
    }
    found = dict.fromkeys(weights, 0)
    source = generator_of(5)
    for _ in range(many):
        sample = draw_until(p, count, source, tries=1000)
        assert sample is not None
        found[tuple(sample.tolist())] += 1
    for subset, weight in weights.items():
        expected = weight / sum(weights.values())
        slack = 6 * math.sqrt(expected * (1 - expected) / many)
        assert abs(found[subset] / many - expected) <= slack


def test_rejection_ends() -> None:
    source = generator_of(1)
    assert draw_until(torch.tensor([1.0, 0.0, 0.0]).double(), 2, source, tries=10**9) is None
    assert draw_until(torch.tensor([1.0, 1.0, 1.0]).double(), 2, source, tries=1000) is None
