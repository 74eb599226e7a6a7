"""Sparse gradients: made dense, and sent uncompressed from the first step that shows them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd import PowerSGDOptimizer
from efsgd.testing import step_together
from tests.simulation import parameters_of
from tests.strategies import gaussian

ROWS, COLUMNS = 20, 12


def sparse(step: int, worker: int) -> Tensor:
    """Some rows, one of them twice."""
    rows = torch.tensor([[(3 * step + worker) % ROWS, (7 * step) % ROWS, (7 * step) % ROWS]])
    values = gaussian((3, COLUMNS), 31 * step + worker)
    return torch.sparse_coo_tensor(rows, values, (ROWS, COLUMNS), check_invariants=True)


def make(world_size: int, **options: Any) -> list[PowerSGDOptimizer]:
    options = {"lr": 0.1, "momentum": 0.9, "momentum_form": "sgd", "rank": 2, **options}
    starts = [
        [gaussian((ROWS, COLUMNS), 1), gaussian((ROWS, COLUMNS), 2)] for _ in range(world_size)
    ]
    return [PowerSGDOptimizer([p.requires_grad_() for p in own], **options) for own in starts]


def sizes(workers: list[PowerSGDOptimizer]) -> int:
    """Steps once; the number of elements in the step's collectives."""
    step_together(workers)
    return int(workers[0].communication_stats()["bytes_sent"]) // 8


UNCOMPRESSED, COMPRESSED, WORDS = ROWS * COLUMNS, 2 * (ROWS + COLUMNS), 4


@pytest.mark.parametrize("first", [0, 2])
def test_what_turns_sparse_is_compressed_once_more_and_nothing_is_lost(first: int) -> None:
    workers = make(2, momentum=0.0)
    start = parameters_of(workers[0])[0].detach().clone()
    total = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    found = []
    for step in range(6):
        for worker, optimizer in enumerate(workers):
            table, other = parameters_of(optimizer)
            gradient = sparse(step, worker)
            total += gradient.to_dense() / 2
            is_sparse = step >= first and worker == 1  # the other's stay dense
            table.grad = gradient if is_sparse else gradient.to_dense()
            other.grad = gaussian((ROWS, COLUMNS), 50 + step + worker)
        found.append(sizes(workers) - WORDS)
    both, one = 2 * COMPRESSED, UNCOMPRESSED + COMPRESSED
    # What is sparse in the very first step is never compressed.
    assert found == ([both] * 3 + [one] * 3 if first else [one] * 6)
    applied = (start - parameters_of(workers[0])[0]) / 0.1
    # What was left over is sent with the first uncompressed gradient; 12 terms, in float64.
    assert torch.allclose(applied, total, rtol=1e-12, atol=1e-12)
