"""TopK, RandomK, RandomBlock and Identity: how much is sent, and what of one tensor."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.workloads import shapes_of
from efsgd import ErrorFeedbackSGD, TensorCompressor
from efsgd.compressors.identity import Identity
from efsgd.compressors.random_block import RandomBlock
from efsgd.compressors.random_k import RandomK
from efsgd.compressors.top_k import TopK
from efsgd.randomness import Draws
from efsgd.testing.gradients import gaussian
from efsgd.testing.strategies import seeds, shapes
from tests.promises.sparse_reference import SPARSE, naive_floats, naive_positions

OF_ONE_TENSOR = [each for each in SPARSE if not each.takes_all_at_once]
DRAWS = Draws(seed=0, index=0, step=0, worker=0)


# ---- what is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_rank_s_budget_of_top_k_is_the_rank_s_bytes(rank: int) -> None:
    resnet = shapes_of("resnet18")
    spent = TopK(rank=rank).payload_bytes(resnet)
    allowed = RandomK(rank=rank).payload_bytes(resnet)
    assert 0 <= allowed - spent <= 4 * 21  # an odd float of each of the 21 matrices is not used


@given(shape=shapes().filter(math.prod), rank=st.integers(1, 6), density=st.floats(0.001, 1))
def test_budgets_are_as_defined(shape: tuple[int, ...], rank: int, density: float) -> None:
    size, numel = torch.Size(shape), math.prod(shape)
    floats, k = naive_floats(shape, rank), max(1, int(density * numel))
    for kind in (RandomK, RandomBlock):
        assert kind(rank=rank).compresses(size) == (floats < numel)
        assert kind(density=density).compresses(size) == (k < numel)
        assert [field.count for field in kind(density=density).fields(size)] == [k]
        if floats < numel:
            assert [field.count for field in kind(rank=rank).fields(size)] == [floats]
    assert TopK(rank=rank).compresses(size) == (floats < numel)
    assert TopK(density=density).compresses(size) == (k < numel)
    assert [field.count for field in TopK(density=density).fields(size)] == [k, k]
    if floats < numel:
        assert [field.count for field in TopK(rank=rank).fields(size)] == [floats // 2] * 2
    assert TopK(rank=rank).count(shape) == max(1, min(floats, numel) // 2)
    assert TopK(density=density, scope="model").compresses(size)
    assert not Identity().compresses(size)


def test_what_is_sent_uncompressed_is_contracted_wholly() -> None:
    for kind in (TopK, RandomK, RandomBlock):
        claimed = [
            (kind(rank=1), (64,), 1.0),
            (kind(rank=1), (0, 4), 1.0),
            (kind(density=0.01), (), 1.0),
            (kind(density=0.25), (12, 10), 0.25),
        ]
        for compressor, shape, expected in claimed:
            assert compressor.claims().contraction(shape) == expected
    assert TopK(density=0.25, scope="model").claims().contraction((12, 10)) == 0.0
    assert Identity().claims().contraction((12, 10)) == 1.0


def test_positions_take_64_bits_where_they_must() -> None:
    for numel, dtype in [(2**31, torch.int32), (2**31 + 1, torch.int64)]:
        values, positions = TopK(density=1e-6).fields(torch.Size([numel]))
        assert (values.dtype, positions.dtype) == (None, dtype)
        assert values.count == positions.count == 2147


@pytest.mark.parametrize("kind", [TopK, RandomK, RandomBlock])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Invalid density and rank: None and None"),
        ({"density": 0.1, "rank": 2}, "Invalid density and rank: 0.1 and 2"),
        *(({"density": d}, "Invalid density") for d in (0, -0.1, 1.1, math.nan, True, "0.1")),
        *(({"rank": r}, "Invalid rank") for r in (0, -1, 2.0, math.nan, True, "2")),
    ],
    ids=str,
)
def test_budgets_that_make_no_sense_are_refused(
    kind: type[TensorCompressor], given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**given)
    good = kind(density=0.5)
    x, y = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    groups = [{"params": [x]}, {"params": [y], "density": None, "rank": None, **given}]
    with pytest.raises(ValueError, match=message):
        ErrorFeedbackSGD(groups, lr=0.1, compressor=good)


def test_ranks_of_models_and_compressions_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid rank: 2.*use density"):
        TopK(rank=2, scope="model")
    for compression in (0, -1, 1.5, math.nan, True, "1/32"):
        with pytest.raises(ValueError, match="Invalid compression"):
            TopK.from_compression(compression)
    assert TopK.from_compression(1, scope="model") == TopK(density=0.5, scope="model")


# ---- one tensor ---------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    compressor=st.sampled_from(OF_ONE_TENSOR),
    shape=shapes().filter(math.prod),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=seeds(),
)
def test_what_is_sent_is_sent_exactly_and_the_rest_stays(
    compressor: TensorCompressor, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    if not compressor.compresses(torch.Size(shape)):
        return
    delta = gaussian(shape, seed).to(dtype)  # no two elements alike
    payload = compressor.compress(delta, DRAWS)
    error = delta.clone()
    compressor.add_decompressed_(error, payload, DRAWS, -1.0)
    sent = compressor.decompress(payload, delta.shape, DRAWS)
    expected = torch.zeros_like(delta)
    positions = naive_positions(compressor, delta, DRAWS)
    expected.view(-1)[positions] = delta.view(-1)[positions]
    assert torch.equal(sent, expected)
    assert torch.equal(error, delta - expected)
    norm = error.double().square().sum() / delta.double().square().sum()
    if not compressor.claims().is_random:
        # The largest k of n elements have at least k/n of the squared norm; 1e-15 is rounding.
        assert norm <= 1 - compressor.claims().contraction(shape) + 1e-15


def test_random_positions_change_from_step_to_step_and_tensor_to_tensor() -> None:
    delta = torch.arange(1.0, 1001.0)
    for kind in (RandomK, RandomBlock):
        places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
        sent = [kind(density=0.01).compress(delta, Draws(*place, worker=0))[0] for place in places]
        assert len({tuple(values.tolist()) for values in sent}) == len(places)
        again = kind(density=0.01).compress(delta, Draws(0, 0, 0, worker=5))[0]
        assert torch.equal(again, sent[0])
