"""LQ-SGD: what is handed over, in which way it is averaged, and real processes."""

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efsgd.algorithms.quantization.coded_mean import Parts
from efsgd.compressors.lq_sgd import LQSGD
from efsgd.testing import step_together
from examples.models import CifarResNet18
from tests.algorithms import lq_sgd_worker as script
from tests.algorithms.lq_sgd_runs import AGGREGATIONS, SHAPES, gradients, train, workers_of
from tests.launcher import launch
from tests.simulation import bits, errors_of, parameters_of, replicated, step_with


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


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shapes", [SHAPES, [(12, 10)], [(10,)], [(1, 30), (30, 1), (2, 2)]])
@pytest.mark.parametrize("world_size", [1, 4])
def test_bytes_sent_are_bytes_announced(
    world_size: int, shapes: list[tuple[int, ...]], aggregation: str
) -> None:
    for dtype, width in itertools.product((torch.float32, torch.float64), (3, 8, 13)):
        compressor = LQSGD(1, width, min_compression_rate=0.0, aggregation=aggregation)
        workers = workers_of(compressor, world_size, shapes, dtype)
        trace = step_with(workers, gradients(world_size, 0, shapes))
        control_words = (len(shapes) + world_size) * dtype.itemsize
        announced = compressor.payload_bytes(shapes, dtype, world_size=world_size)
        stats = workers[0].communication_stats()
        assert stats["bytes_sent"] == announced + control_words
        assert (
            sum(traced.nbytes for traced in trace[-stats["collectives"] :]) == (stats["bytes_sent"])
        )


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
    ("width", "rank", "ratio"),
    [
        (8, 1, 596.5), (8, 2, 401.7), (8, 4, 243.0), (8, 7, 152.6),
        (4, 1, 787.3), (4, 2, 596.5), (4, 4, 401.7), (4, 7, 269.7),
    ],
)  # fmt: skip
def test_ratios_on_the_resnet_for_cifar(width: int, rank: int, ratio: float) -> None:
    shapes = [p.shape for p in CifarResNet18().parameters()]
    sent = LQSGD(rank=rank, bits=width).payload_bytes(shapes)
    assert round(4 * 11_173_962 / sent, 1) == ratio
    # 36325 is the sum of n + m; each of the two payloads is rounded up to a byte.
    exact = 4 * 9610 + rank * 36_325 * width / 8 + 2 * 21 * 4
    assert 0 <= sent - exact < 2


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


# ---- real processes -----------------------------------------------------------------------------


@pytest.mark.xdist_group("processes")
def test_processes_compute_what_lockstep_computes(tmp_path: Path) -> None:
    reports = launch(script.__file__, 3, tmp_path)
    for worker, report in enumerate(reports):
        assert report["rows"] == [[[other, worker, 7] for other in range(3)]] * 3
    for aggregation in AGGREGATIONS:
        workers = [script.make(aggregation) for _ in range(3)]
        for step in range(script.STEPS):
            for worker, optimizer in enumerate(workers):
                script.set_gradients(optimizer, step, worker)
            step_together(workers)
        expected = [script.fingerprint(optimizer) for optimizer in workers]
        assert [report[aggregation] for report in reports] == expected
