"""A step's phases carry the names of the paper's lines, and are timed on request only."""

import torch
from torch.profiler import profile

from efsgd import PowerSGDOptimizer

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


def an_optimizer() -> PowerSGDOptimizer:
    x = torch.zeros(12, 10, requires_grad=True)
    x.grad = torch.ones(12, 10)
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
