"""Working chunk by chunk covers every element once, needs little memory, and changes no result."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import profile

from efsgd import PowerSGDOptimizer
from efsgd.algorithms.low_rank import products
from efsgd.layout import Batch, Entry
from tests.simulation import make_workers, parameters_of, step_with
from tests.strategies import gaussian


@settings(max_examples=200)
@given(
    n=st.integers(1, 9),
    m=st.integers(1, 9),
    floats=st.integers(1, 200),
    wanted=st.lists(st.booleans(), min_size=1, max_size=7),
)
def test_chunks_cover_what_is_wanted_once_and_nothing_else(
    n: int, m: int, floats: int, wanted: list[bool]
) -> None:
    entries = tuple(Entry(10 + index, (n, m), 1) for index in range(len(wanted)))
    batch = Batch(n, m, 1, entries)
    covered = torch.zeros(len(wanted), n, dtype=torch.int64)
    for matrices, rows in batch.chunks({10 + i for i, is_in in enumerate(wanted) if is_in}, floats):
        covered[matrices, rows] += 1
        size = covered[matrices, rows].numel() * m
        assert 0 < size <= max(floats, m)
    expected = torch.tensor(wanted, dtype=torch.int64)[:, None].expand(-1, n)
    assert torch.equal(covered, expected)


OPTIONS: list[dict[str, Any]] = [
    {"momentum_form": "paper", "momentum": 0.9, "weight_decay": 0.01},
    {"momentum_form": "sgd", "momentum": 0.9, "nesterov": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_size_of_the_chunks_does_not_matter(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = [(12, 10), (6, 5, 3, 3), (12, 10), (30,), (12, 10)]
    ends = []
    for floats in (1, 37, 240, 2**19):
        monkeypatch.setattr(products, "FLOATS_AT_ONCE", floats)
        start = [gaussian(shape, 1, i) for i, shape in enumerate(shapes)]
        workers = make_workers(start, 2, lr=0.1, rank=2, **options)
        for step in range(4):
            gradients = [
                [None if (step, i) == (2, 2) else gaussian(shape, 2, step, worker, i)
                 for i, shape in enumerate(shapes)]
                for worker in range(2)
            ]  # fmt: skip
            step_with(workers, gradients)
        ends.append([p.detach() for p in parameters_of(workers[0])])
    for other in ends[1:]:
        for a, b in zip(ends[0], other, strict=True):
            assert (a - b).abs().max() < 1e-12  # float64; products of other shapes round otherwise


# In floats: larger than everything that a step allocates anew, which is as large as factors are.
SHAPES = [(256, 2048), (512, 128, 3, 3), (512,), (1000, 300)]


def changes_of(profiler: profile) -> list[int]:
    """Bytes that were allocated, and freed where negative, in order."""
    recorded = profiler.profiler.kineto_results.events()
    events = [event for event in recorded if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_steady_step_allocates_no_more_than_factors(options: dict[str, Any]) -> None:
    ps = [torch.zeros(shape, requires_grad=True) for shape in SHAPES]
    optimizer = PowerSGDOptimizer(ps, lr=0.1, rank=4, **options)
    for p in ps:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    with profile(profile_memory=True) as profiler:
        optimizer.step()
    allocated = sum(max(size, 0) for size in changes_of(profiler))
    factors = 4 * 4 * sum(p.shape[0] + p[0].numel() for p in ps if p.ndim > 1)
    # P̂ and what it is made of, and Q brought to one scale; far less than the 4.6 MB of the model.
    assert allocated <= 12 * factors < 4 * sum(p.numel() for p in ps) / 2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_memory_is_momenta_errors_scratch_and_factors(options: dict[str, Any]) -> None:
    shapes = [(1024, 2048), (512, 256, 3, 3), (512,)] * 2
    ps = [torch.zeros(shape, requires_grad=True) for shape in shapes]
    for p in ps:
        p.grad = torch.ones_like(p)
    with profile(profile_memory=True) as profiler:
        optimizer = PowerSGDOptimizer(ps, lr=0.1, rank=4, **options)
        for _ in range(3):
            optimizer.step()
    peak = max(itertools.accumulate(changes_of(profiler)))
    everything = sum(4 * p.numel() for p in ps)
    chunk = 4 * products.FLOATS_AT_ONCE / everything
    assert 3.0 < peak / everything - chunk <= 3.1
