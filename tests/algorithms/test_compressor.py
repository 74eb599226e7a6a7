"""What rank-r compression by power iteration must do, whatever the matrix."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efsgd import PowerSGD
from efsgd.algorithms.interfaces import Placement
from efsgd.algorithms.low_rank.factors import initial_query
from efsgd.algorithms.low_rank.products import LowRank
from efsgd.algorithms.powersgd import PowerIteration
from efsgd.layout import Blocks, Entry, Layout, matrix_shape
from efsgd.testing.gradients import gaussian
from efsgd.testing.strategies import seeds, shape_lists
from efsgd.wire.collectives import run
from efsgd.wire.transports import Alone
from tests.simulation import difference
from tests.strategies import with_layout

CPU = torch.device("cpu")


def power_iteration(matrices: torch.Tensor, rank: int, seed: int = 0) -> PowerIteration:
    """Algorithm 1 for a batch [b, n, m], with the Q of a fresh optimizer."""
    entries = [Entry(i, tuple(matrix.shape), rank) for i, matrix in enumerate(matrices)]
    aggregator = PowerIteration(Layout.plan(entries), Placement(matrices.dtype, CPU))
    for index, state in aggregator.state().items():
        state["q"].copy_(initial_query(seed, index, matrices.shape[2], rank))
    return aggregator


def write_(values: list[torch.Tensor], places: list[torch.Tensor]) -> None:
    for value, place in zip(values, places, strict=True):
        place.copy_(value)


def compress(
    aggregator: PowerIteration, matrices: torch.Tensor
) -> tuple[LowRank, LowRank, torch.Tensor]:
    """One worker's step: local and mean representation, and the mean decompressed."""
    deltas = Blocks(aggregator.layout, matrices.dtype, CPU)
    deltas.batches[0].copy_(matrices)
    local = run(aggregator.compress(deltas), Alone())
    mean = run(aggregator.aggregate(local), Alone())
    out = Blocks(aggregator.layout, matrices.dtype, CPU)
    mean.decompress_with_(write_, out.views)
    return local, mean, out.batches[0]


sizes = st.integers(1, 14)


@settings(max_examples=100)
@given(n=sizes, m=sizes, rank=st.integers(1, 6), extra=st.integers(0, 3), seed=seeds())
def test_matrices_of_rank_up_to_r_are_recovered(
    n: int, m: int, rank: int, extra: int, seed: int
) -> None:
    rank = min(rank, n, m)
    kept = min(n, m, rank + extra)
    matrices = gaussian((3, n, rank), seed, 1) @ gaussian((3, rank, m), seed, 2)
    _, mean, out = compress(power_iteration(matrices, kept, seed), matrices)
    # Exact but for rounding, times the condition of M Q, which a Gaussian Q rarely spoils.
    condition = float(torch.linalg.matrix_norm(torch.linalg.pinv(matrices, rtol=1e-10), 2).max()
                      * torch.linalg.matrix_norm(matrices, 2).max())  # fmt: skip
    assert difference(out, matrices) < 1e-11 * max(condition, 1) ** 2
    gram = mean.P_hat[0].mT @ mean.P_hat[0]
    assert (gram - torch.eye(kept, dtype=torch.float64)).abs().max() < 1e-14


@settings(max_examples=25)
@given(n=st.integers(2, 14), m=st.integers(2, 14), rank=st.integers(1, 4), seed=seeds())
def test_warm_started_repetition_finds_the_best_approximation(
    n: int, m: int, rank: int, seed: int
) -> None:
    smaller = min(n, m)
    rank = min(rank, smaller)
    # Singular values 2^0, 2^-1, …: the subspace converges by a factor of 4 per step.
    left, _ = torch.linalg.qr(gaussian((n, smaller), seed, 1))
    right, _ = torch.linalg.qr(gaussian((m, smaller), seed, 2))
    values = 2.0 ** -torch.arange(smaller, dtype=torch.float64)
    matrix = (left * values) @ right.mT
    best = (left[:, :rank] * values[:rank]) @ right[:, :rank].mT
    aggregator = power_iteration(matrix[None], rank, seed)
    for _ in range(60):
        _, _, out = compress(aggregator, matrix[None])
        aggregator.commit_()
    # 4^-60 is far below rounding; a Gaussian Q starts with some part in each direction.
    assert difference(out[0], best) < 1e-12
    distance = torch.linalg.matrix_norm(matrix - out[0])
    assert distance <= values[rank:].norm() * (1 + 1e-12) + 1e-12


def test_one_cold_step_is_worse_than_the_best_and_repetition_never_hurts() -> None:
    matrix = gaussian((20, 15), 3)
    aggregator = power_iteration(matrix[None], 3)
    errors = []
    for _ in range(30):
        _, _, out = compress(aggregator, matrix[None])
        aggregator.commit_()
        errors.append(float(torch.linalg.matrix_norm(matrix - out[0])))
    best = float(torch.linalg.svdvals(matrix)[3:].norm())
    assert errors[0] > 1.01 * best
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(errors))
    assert errors[-1] < 1.01 * best


@given(shape_lists(max_size=8), st.integers(1, 4), st.integers(0, 5))
def test_layout_plans_are_idempotent_and_complete(
    shapes: list[tuple[int, ...]], rank: int, words: int
) -> None:
    compressor = PowerSGD(rank=rank)
    settings_of = compressor.settings()
    entries = [
        Entry(index, tuple(shape), compressor.level(shape, settings_of))
        for index, shape in enumerate(shapes)
    ]
    layout = Layout.plan(reversed(entries), words)
    assert Layout.plan(layout.entries, words) == layout
    assert hash(Layout.plan(layout.entries, words)) == hash(layout)
    batched = [entry for batch in layout.batches for entry in batch.entries]
    assert sorted([*batched, *layout.vectors], key=lambda entry: entry.index) == entries
    total = sum(math.prod(shape) for shape in shapes)
    assert layout.matrix_floats + layout.vector_floats == total + words
    blocks = Blocks(layout, torch.float64, CPU, torch.zeros(layout.vector_floats).double())
    for index, shape in enumerate(shapes):
        assert blocks.views[index].shape == shape
        blocks.views[index].fill_(index)
    for index in range(len(shapes)):  # no two views overlap
        assert bool((blocks.views[index] == index).all())


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="occurs twice"):
        Layout.plan([Entry(1, (3,), None), Entry(1, (3,), None)])
    for shape in [(0,), (0, 4), (4, 0)]:
        with pytest.raises(ValueError, match="nothing to compress"):
            Layout.plan([Entry(0, shape, 1)])


@pytest.mark.parametrize("shape", [(6, 4), (4, 3, 2, 2), (2, 3, 4)])
def test_a_matrix_is_rows_by_all_the_rest(shape: tuple[int, ...]) -> None:
    n, m = matrix_shape(shape)
    tensor = with_layout(gaussian(shape, 1), "transposed")
    layout = Layout.plan([Entry(0, shape, 1)])
    blocks = Blocks(layout, torch.float64, CPU)
    blocks.views[0].copy_(tensor)
    assert torch.equal(blocks.batches[0][0], tensor.reshape(n, m))


@pytest.mark.parametrize(
    ("shape", "rank", "rate", "expected"),
    [
        ((64, 64), 4, 1.0, 4),
        ((64, 64), 32, 1.0, None),  # 4096 > 4096 is false
        ((64, 64), 31, 1.0, 31),
        ((64, 64), 4, 8.0, None),  # 4096 > 8 * 4 * 128 is false
        ((64, 64), 4, 7.9, 4),
        ((64, 64), 400, 0.0, 64),
        ((3, 1000), 4, 0.0, 3),
        ((64,), 4, 0.0, None),
        ((), 4, 0.0, None),
        ((0, 8), 4, 0.0, None),
        ((64, 64), 1, math.inf, None),
    ],
)
def test_which_tensors_are_compressed(
    shape: tuple[int, ...], rank: int, rate: float, expected: int | None
) -> None:
    compressor = PowerSGD(rank=rank, min_compression_rate=rate)
    assert compressor.level(shape, compressor.settings()) == expected
