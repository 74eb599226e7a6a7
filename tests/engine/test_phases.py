"""A step's phases carry the names of the paper's lines, and are timed on request only."""

from collections import Counter

import pytest
import torch
from torch.profiler import profile

from efsgd import CollectiveError, PowerSGDOptimizer
from efsgd.testing import step_together

NAMES = [
    "Alg. 2, line 7: add errors and gradients",
    "Alg. 1, line 3: P = M Q",
    "Alg. 1, line 4: all-reduce P",
    "Alg. 1, line 5: orthogonalize P",
    "Alg. 1, line 6: Q = M^T P",
    "Alg. 2, line 9: new errors",
    "Alg. 1, line 7: all-reduce Q",
    "Alg. 2, lines 11 to 13: update",
]


def an_optimizer(gradient: float = 1.0) -> PowerSGDOptimizer:
    x = torch.zeros(12, 10, requires_grad=True)
    x.grad = torch.full((12, 10), gradient)
    return PowerSGDOptimizer([x], lr=0.1, momentum=0.9, rank=2)


def test_the_profiler_shows_every_phase_once_per_step_in_the_order_of_the_paper() -> None:
    optimizer = an_optimizer()
    optimizer.step()
    with profile() as profiler:
        optimizer.step()
    ranges = sorted(
        (event.time_range.start, event.name)
        for event in profiler.events()
        if event.name.startswith("Alg. ")
    )
    assert [name for _, name in ranges] == NAMES


def test_phases_are_timed_while_asked_for() -> None:
    optimizer = an_optimizer()
    optimizer.step()
    assert not optimizer.time_phases
    assert "phase_seconds" not in optimizer.communication_stats()
    optimizer.time_phases = True
    for _ in range(2):  # of the last step, not summed over steps
        optimizer.step()
        seconds = optimizer.communication_stats()["phase_seconds"]
        assert list(seconds) == NAMES
        assert all(value >= 0 for value in seconds.values())
    before = dict(seconds)
    seconds.clear()  # what is reported is the caller's own
    assert optimizer.communication_stats()["phase_seconds"] == before
    optimizer.time_phases = False
    optimizer.time_phases = True
    assert optimizer.communication_stats()["phase_seconds"] == {}  # nothing old
    optimizer.time_phases = False
    optimizer.step()
    assert "phase_seconds" not in optimizer.communication_stats()


def test_two_dtypes_are_two_sections_whose_phases_add_up() -> None:
    ps = [torch.zeros(12, 10, dtype=d, requires_grad=True) for d in (torch.float32, torch.float64)]
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer = PowerSGDOptimizer(ps, lr=0.1, rank=2)
    optimizer.time_phases = True
    optimizer.step()
    assert sorted(optimizer.communication_stats()["phase_seconds"]) == sorted(NAMES)


def test_a_step_that_fails_in_a_phase_leaves_the_next_one_s_times_alone() -> None:
    workers = [an_optimizer(gradient) for gradient in (1.0, 2.0)]
    for worker in workers:
        worker.time_phases = True
    step_together(workers)
    with pytest.raises(CollectiveError):
        step_together(workers, fail_at=1)
    step_together(workers)
    assert list(workers[0].communication_stats()["phase_seconds"]) == NAMES


def test_workers_in_one_thread_may_be_profiled() -> None:
    workers = [an_optimizer(gradient) for gradient in (1.0, 2.0, 3.0)]
    with profile() as profiler:
        step_together(workers)
    named = Counter(e.name for e in profiler.events() if e.name.startswith("Alg. "))
    assert named == Counter({name: 3 for name in NAMES})
