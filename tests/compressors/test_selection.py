"""Which elements are selected: those of largest magnitude, or a subset at random."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efsgd.compressors import random_k
from efsgd.compressors import top_k as selection
from efsgd.compressors.random_block import RandomBlock
from efsgd.compressors.random_k import draw_subset, draw_subsets
from efsgd.compressors.top_k import largest
from efsgd.randomness import Draws, generator_of, random_bits
from efsgd.testing.strategies import seeds

# With these settings sampling, its fall-backs and work chunk by chunk happen in small tensors.
SMALL = {"FEW": 20, "SAMPLES": 120, "AT_ONCE": 70}


#: Tensors that are easy or hard for a guess from a sample: random numbers [numel] float64, their
#: positions, and which of these are sampled.
KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "gaussian": lambda random, *_: random,
    "zeros": lambda random, *_: torch.zeros_like(random),
    "constant": lambda random, *_: torch.full_like(random, -2.0),
    "signs": lambda random, *_: random.sign(),
    "few values": lambda random, *_: (random * 2).round(),
    "rare": lambda random, position, _: random * (position % 11 == 0),
    "sample is large": lambda random, _, sampled: torch.where(sampled, 100.0 + random, random),
    "sample is small": lambda random, _, sampled: torch.where(sampled, 0.0, random),
    "ascending": lambda _, position, __: position.double(),
    "tiny": lambda random, *_: random * 1e-300,
}


def of_kind(kind: str, numel: int, seed: int) -> Tensor:
    random = torch.randn(numel, generator=generator_of(seed), dtype=torch.float64)
    position = torch.arange(numel)
    return KINDS[kind](random, position, position % ((numel // SMALL["SAMPLES"]) | 1) == 0)


def check_largest(flat: Tensor, k: int) -> None:
    before = flat.clone()
    positions = largest(flat, k)
    assert torch.equal(flat, before)
    assert positions.dtype == torch.int64
    assert positions.tolist() == sorted(set(positions.tolist()))
    found = sorted((abs(value) for value in flat[positions].tolist()), reverse=True)
    assert found == sorted((abs(value) for value in flat.tolist()), reverse=True)[:k]


@settings(max_examples=400)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    numel=st.integers(1, 1200),
    share=st.one_of(st.floats(0, 0.15), st.floats(0, 1)),
    seed=seeds(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_the_largest_are_those_that_sorting_finds(
    kind: str, numel: int, share: float, seed: int, dtype: torch.dtype
) -> None:
    with mock.patch.multiple(selection, **SMALL):
        check_largest(of_kind(kind, numel, seed).to(dtype), max(1, int(share * numel)))


@pytest.mark.parametrize("share", [1e-5, 0.001, 0.01, 1 / 64, 0.2, 0.9])
def test_a_large_tensor_s_sum_of_magnitudes_is_that_of_topk(share: float) -> None:
    flat = torch.randn(300_001, generator=generator_of(3), dtype=torch.float64)
    k = max(1, int(share * len(flat)))
    chosen = flat[largest(flat, k)].abs().sort().values
    expected = torch.topk(flat.abs(), k).values.sort().values
    assert torch.equal(chosen, expected)


@pytest.mark.parametrize("kind", ["gaussian", "zeros", "constant", "rare", "few values"])
@pytest.mark.parametrize("share", [0.001, 0.01, 1 / 64])
def test_few_elements_of_a_large_tensor_are_given_to_topk(kind: str, share: float) -> None:
    flat = of_kind(kind, 2**18, 5)
    k = int(share * len(flat))
    sizes = []

    def watched(values: Tensor, k: int) -> Tensor:
        sizes.append(len(values))
        return top(values, k)

    top = selection._top
    with mock.patch.object(selection, "_top", watched):
        assert len(largest(flat, k)) == k
    # Four standard deviations of the 16 that are expected in a sample, at the least, are as many
    # again, and four are added; the sample itself may be as far off as that.
    assert sum(sizes) <= 3.25 * k


def test_where_fewer_than_k_differ_from_zero_all_of_them_are_found() -> None:
    flat = torch.zeros(2**18)
    flat[-100:] = torch.randn(100, generator=generator_of(6))
    check_largest(flat, 2000)


# ---- subsets at random --------------------------------------------------------------------------

Draw = Callable[[int, int, torch.Generator], Tensor]


def from_bits(numel: int, k: int, generator: torch.Generator) -> Tensor:
    """What is drawn for several tensors together, of one of them."""
    path = (int(torch.randint(2**62, (), generator=generator)),)
    return draw_subsets(k, random_bits(path, torch.tensor([3, 4]), numel))[1]


DRAWS = [draw_subset, random_k._few, random_k._many, from_bits]
# All tests of chance below reject what is right once in a million times, for a seed: seeds are
# fixed, and whoever changes them need not expect a failure.
REJECTED = 1e-6


def p_value(statistic: float, degrees: int) -> float:
    """How often chi-squared exceeds the statistic."""
    half = torch.tensor([degrees / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def is_uniform(outcomes: Iterable[object], kinds: int) -> bool:
    counts = Counter(outcomes)
    assert len(counts) <= kinds
    expected = counts.total() / kinds
    squares = sum((count - expected) ** 2 for count in counts.values())
    squares += (kinds - len(counts)) * expected**2
    return p_value(squares / expected, kinds - 1) > REJECTED


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize(("numel", "k"), [(6, 3), (7, 2), (6, 5), (5, 1)])
def test_all_subsets_are_equally_likely(draw: Draw, numel: int, k: int) -> None:
    same = generator_of(1, numel, k)
    outcomes = [tuple(draw(numel, k, same).tolist()) for _ in range(2000)]
    assert is_uniform(outcomes, len(list(itertools.combinations(range(numel), k))))


@pytest.mark.parametrize("draw", DRAWS)
def test_all_positions_are_equally_likely(draw: Draw) -> None:
    numel, k, times = 4000, 120, 2000
    same = generator_of(2)
    drawn = torch.cat([draw(numel, k, same) for _ in range(times)])
    expected = times * k / numel
    squares = (drawn.bincount(minlength=numel) - expected).double().square().sum()
    # Without replacement counts vary less: by (numel - k) / (numel - 1).
    statistic = float(squares / expected * (numel - 1) / (numel - k))
    assert p_value(statistic, numel - 1) > REJECTED


@settings(max_examples=200)
@given(numel=st.integers(1, 400), share=st.floats(0, 1), seed=seeds(), draw=st.sampled_from(DRAWS))
def test_a_subset_has_as_many_different_positions_as_asked_for(
    numel: int, share: float, seed: int, draw: Draw
) -> None:
    k = int(share * numel)
    k = min(k, numel - 1) if draw is random_k._few else k
    positions = draw(numel, k, generator_of(seed)).tolist()
    assert len(positions) == k
    assert positions == sorted(set(positions))
    assert all(0 <= position < numel for position in positions)


def test_positions_beyond_32_bits_are_drawn() -> None:
    numel, k = 2**40, 4000
    positions = draw_subset(numel, k, generator_of(4))
    assert positions.unique().numel() == k
    assert int(positions.min()) >= 0 and int(positions.max()) < numel
    assert is_uniform((positions >> 37).tolist(), 8)
    assert is_uniform((positions & 7).tolist(), 8)


def test_a_draw_depends_on_its_generator_alone() -> None:
    before = torch.get_rng_state()
    for numel, k in [(1000, 10), (1000, 400), (1000, 900)]:
        first, again = (draw_subset(numel, k, generator_of(5)) for _ in range(2))
        assert torch.equal(first, again)
        assert not torch.equal(first, draw_subset(numel, k, generator_of(6)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_block_starts_anywhere_and_wraps_around() -> None:
    numel, k = 10, 4
    delta = torch.arange(1.0, numel + 1)
    starts = []
    for step in range(2000):
        (values,) = RandomBlock(density=0.4).compress(delta, Draws(0, 0, step, 0))
        starts.append(int(values[0]) - 1)
        expected = [(starts[-1] + offset) % numel + 1 for offset in range(k)]
        assert values.tolist() == expected
    assert is_uniform(starts, numel)
