"""Sparse gradients: made dense, and sent uncompressed from the first step that shows them."""

import pytest
import torch

from tests.optimizers.swap_in.test_sparse import embedding_gradient
from tests.simulation import make_workers, parameters_of, step_with
from tests.strategies import gaussian

# Of a matrix; and the words of two parameters and two workers.
UNCOMPRESSED, COMPRESSED, WORDS = 12 * 10, 2 * (12 + 10), 4


@pytest.mark.parametrize("first", [0, 2])
def test_what_turns_sparse_is_compressed_once_more_and_nothing_is_lost(first: int) -> None:
    start = [gaussian((12, 10), 1), gaussian((12, 10), 2)]
    workers = make_workers(start, 2, lr=0.1, momentum_form="sgd", rank=2)
    total = torch.zeros(12, 10, dtype=torch.float64)
    found = []
    for step in range(6):
        given = []
        for worker in range(2):
            is_sparse = step >= first and worker == 1  # the other's stay dense
            table = embedding_gradient(step, worker=worker, is_sparse=is_sparse)
            given.append([table, gaussian((12, 10), 50 + step + worker)])
            total += (table.to_dense() if is_sparse else table) / 2
        step_with(workers, given)
        found.append(workers[0].communication_stats()["bytes_sent"] // 8 - WORDS)
    both, one = 2 * COMPRESSED, UNCOMPRESSED + COMPRESSED
    # What is sparse in the very first step is never compressed.
    assert found == ([both] * 3 + [one] * 3 if first else [one] * 6)
    applied = (start[0] - parameters_of(workers[0])[0]) / 0.1
    # What was left over is sent with the first uncompressed gradient; 12 terms, in float64.
    assert torch.allclose(applied, total, rtol=1e-12, atol=1e-12)
