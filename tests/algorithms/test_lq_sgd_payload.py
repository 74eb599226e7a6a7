"""LQ-SGD: what is handed over, in which way it is averaged, and real processes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efsgd.algorithms.quantization.coded_mean import Parts
from efsgd.compressors.lq_sgd import LQSGD
from tests.algorithms.lq_sgd_runs import AGGREGATIONS, SHAPES, train, workers_of
from tests.simulation import bits, errors_of, parameters_of, replicated


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [2, 5, 8, 13, 24, 32])
def test_both_ways_of_averaging_agree_to_the_bit(
    width: int, world_size: int, dtype: torch.dtype
) -> None:
    ends = []
    for aggregation in AGGREGATIONS:
        compressor = LQSGD(rank=2, bits=width, aggregation=aggregation)
        workers = workers_of(compressor, world_size, dtype=dtype)
        train(workers, 3)
        ends.append([bits([parameters_of(own), errors_of(own)]) for own in workers])
        assert all(replicated(own) == replicated(workers[0]) for own in workers)
    assert ends[0] == ends[1]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 9))
def test_parts_hold_each_number_once(sizes: list[int], world_size: int) -> None:
    parts = Parts.cut(sizes, world_size)
    matrix_of = [matrix for matrix, size in enumerate(sizes) for _ in range(size)]
    assert 0 <= parts.size * world_size - len(matrix_of) < world_size
    widths = [1]
    for worker, first in enumerate(parts.first):
        own = matrix_of[worker * parts.size :][: parts.size]
        assert first == (own[0] if own else len(sizes) - 1)
        widths.append(len(set(own)))
    assert parts.width == max(widths)


# ---- what is sent -------------------------------------------------------------------------------


def test_with_gather_the_number_of_workers_makes_no_difference() -> None:
    assert len({LQSGD().payload_bytes(SHAPES, world_size=w) for w in (1, 4, 16)}) == 1


def test_with_scatter_bytes_do_not_grow_with_the_number_of_workers() -> None:
    shapes, scattered = [(512, 512)] * 4, LQSGD(aggregation="scatter")
    numbers = 4 * 4 * (512 + 512)
    sent = [scattered.payload_bytes(shapes, world_size=w) for w in (1, 2, 4, 8, 16, 32)]
    assert sent == sorted(sent, reverse=True)
    # A byte for each number, 4 / 32 for their means, and two scales of 4 bytes for each of 32 rows.
    assert sent[-1] == numbers + numbers * 4 // 32 + 2 * 32 * 4


@pytest.mark.parametrize(
    ("aggregation", "kinds"),
    [
        ("gather", ["AllReduceMean", "AllGather", "AllGather"]),
        ("scatter", ["AllReduceMean", *["AllToAll", "AllGather"] * 2]),
    ],
)
def test_every_step_asks_for_the_same(aggregation: str, kinds: list[str]) -> None:
    workers = workers_of(LQSGD(rank=2, aggregation=aggregation), 3)
    traces = [train(workers, 1, step) for step in range(3)]
    assert [traced.kind for traced in traces[0]][-len(kinds) :] == kinds
    assert traces[1] == traces[2] == traces[0][-len(kinds) :]
