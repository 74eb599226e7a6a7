"""LQ-SGD: against a naive version of itself, against PowerSGD, and what all compressors promise."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efsgd import PowerSGD, WorkerMismatchError
from efsgd.algorithms.low_rank.factors import initial_query
from efsgd.compressors.lq_sgd import LQSGD
from efsgd.testing.gradients import gaussian
from efsgd.testing.strategies import seeds
from tests.algorithms.lq_sgd_runs import AGGREGATIONS, gradients, train, workers_of
from tests.promises.reference import decompress, mean, orthogonalize
from tests.simulation import (
    bits,
    difference,
    errors_of,
    parameters_of,
    step_with,
    unchanged,
)

# ---- against a naive version --------------------------------------------------------------------


def quantize(matrix: Tensor, bits: int, alpha: float) -> Tensor:
    """What arrives of a matrix that is sent as codes."""
    scale, L = float(matrix.abs().max()), 2 ** (bits - 1) - 1
    if scale == 0:
        return matrix
    found = []
    for x in matrix.flatten().tolist():
        q = math.log(1 + alpha * abs(x / scale)) / math.log(1 + alpha)
        level = ((1 + alpha) ** (round(L * q) / L) - 1) / alpha
        found.append(math.copysign(scale * level, x))
    return torch.tensor(found, dtype=torch.float64).reshape(matrix.shape)


def leveled(query: Tensor) -> Tensor:
    """Each column by a power of two, so that its largest element is in [0.5, 1)."""
    columns = [column * 2.0 ** -math.frexp(float(column.abs().max()))[1] for column in query.T]
    return torch.stack(columns, dim=1)


class Naive:
    """LQ-SGD with error feedback for one matrix on all workers, float64, nothing in place."""

    def __init__(self, n: int, m: int, rank: int, bits: int, alpha: float, world_size: int) -> None:
        self.errors = [torch.zeros(n, m, dtype=torch.float64) for _ in range(world_size)]
        self.query = initial_query(0, 0, m, rank)
        self.bits, self.alpha = bits, alpha

    def update(self, matrices: Sequence[Tensor]) -> Tensor:
        deltas = [g + e for g, e in zip(matrices, self.errors, strict=True)]
        sent = [quantize(d @ leveled(self.query), self.bits, self.alpha) for d in deltas]
        p_hat = orthogonalize(mean(sent))
        queries = [quantize(d.T @ p_hat, self.bits, self.alpha) for d in deltas]
        self.errors = [d - decompress(p_hat, q) for d, q in zip(deltas, queries, strict=True)]
        average = mean(queries)
        alive = average.any(dim=0)
        self.query = torch.where(alive, average, self.query)
        return decompress(p_hat, average)


@settings(max_examples=30)
@given(
    n=st.integers(4, 12), m=st.integers(4, 12), rank=st.integers(1, 3), bits=st.integers(2, 20),
    alpha=st.sampled_from([0.5, 10.0, 255.0]), world_size=st.sampled_from([1, 2, 3]),
    aggregation=st.sampled_from(AGGREGATIONS), seed=seeds(),
)  # fmt: skip
def test_it_is_the_naive_version(
    n: int, m: int, rank: int, bits: int, alpha: float, world_size: int, aggregation: str, seed: int
) -> None:
    if rank > 1:  # of very few bits, columns are often parallel, and completed by chance
        bits += 4
    naive = Naive(n, m, rank, bits, alpha, world_size)
    compressor = LQSGD(rank, bits, alpha, min_compression_rate=0.0, aggregation=aggregation)
    workers = workers_of(compressor, world_size, [(n, m)])
    parameter = parameters_of(workers[0])[0]
    for step in range(3):
        matrices = [gaussian((n, m), seed, step, w) for w in range(world_size)]
        before = parameter.detach().clone()
        update = naive.update(matrices)
        step_with(workers, [[matrix] for matrix in matrices])
        # Rounding of 1e-16 decides for another code once in 1e10 numbers, and is otherwise
        # multiplied by the condition of P, which is below 1e5 for these.
        assert difference(before - parameter.detach(), update) < 1e-10
        for worker, expected in zip(workers, naive.errors, strict=True):
            assert difference(errors_of(worker)[0], expected) < 1e-9
        assert difference(workers[0].state[parameter]["q"], naive.query) < 1e-9


def test_with_many_bits_it_is_power_sgd() -> None:
    distances = {}
    for width in (8, 12, 16, 20, 24, 28, 32):
        others = workers_of(PowerSGD(rank=2), 3)
        workers = workers_of(LQSGD(rank=2, bits=width), 3)
        for optimizers in (others, workers):
            train(optimizers, 5)
        pairs = zip(parameters_of(workers[0]), parameters_of(others[0]), strict=True)
        distances[width] = max(difference(a, b) for a, b in pairs)
    # A code moves a number by up to ln(1 + α)(1 + 1/α) / 2L = 2.64 · 2^-bits of the largest one;
    # 100 is for what five steps of error feedback, on noise, make of it.
    assert all(distance <= 2.64 * 100 * 2.0**-width for width, distance in distances.items())
    assert 2**20 < distances[8] / distances[32] < 2**28


# ---- promises -----------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    ("name", "value"), [("rank", 3), ("bits", 5), ("alpha", 2.0), ("aggregation", None)]
)
def test_a_setting_that_one_worker_changes_alone_is_an_error_on_all(
    name: str, value: Any, aggregation: str
) -> None:
    workers = workers_of(LQSGD(rank=2, aggregation=aggregation), 3)
    train(workers, 1)
    other = {"gather": "scatter", "scatter": "gather"}[aggregation]
    workers[1].param_groups[0][name] = other if value is None else value
    mismatch = pytest.raises(WorkerMismatchError, match=f"{name}=|level")
    with unchanged(workers), mismatch as caught:
        train(workers, 1, 1)
    assert len(caught.value.__notes__) == 2


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("width", [2, 8, 32])
def test_after_zeros_it_goes_on_as_if_they_had_not_been(width: int, aggregation: str) -> None:
    compressor = LQSGD(rank=2, bits=width, aggregation=aggregation)
    workers, twins = (workers_of(compressor, 2, dtype=torch.float32) for _ in range(2))
    for _ in range(2):
        step_with(workers, gradients(2, 0, kind="zero"))
    assert bits([parameters_of(own) for own in workers]) == bits(list(map(parameters_of, twins)))
    assert not any(error.any() for own in workers for error in errors_of(own))
    for optimizers in (workers, twins):
        train(optimizers, 2)
    assert all(parameter.any() for parameter in parameters_of(workers[0]))
    assert bits([parameters_of(own) for own in workers]) == bits(list(map(parameters_of, twins)))


def test_what_is_too_large_to_be_sent_is_sent_later() -> None:
    workers = workers_of(LQSGD(rank=2), 2, [(16, 40)], torch.float32, lr=1e-38)
    huge = (3.3e38 * gaussian((16, 40), 1).sign()).float()
    step_with(workers, [[huge], [huge]])
    parameter = parameters_of(workers[0])[0]
    assert parameter.isfinite().all()
    kept = errors_of(workers[0])[0].double() * 1e-38 - parameter.detach().double()
    # Each is rounded, at 6e-8.
    assert difference(kept, 1e-38 * huge.double()) < 1e-6
