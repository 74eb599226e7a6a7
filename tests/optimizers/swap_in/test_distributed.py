"""H: what SGD has not: several workers. Here what no other test holds.

H1, bitwise equal workers: tests/promises/test_workers_stay_equal.py for any gradients, over real
processes tests/wire/test_processes.py; here accumulation and steps that are skipped. H2, the wire
schedule: tests/promises/test_workers_stay_equal.py, and for missing gradients test_gradients.py
beside this file. H3, groups: tests/wire/test_processes.py has subgroups and outsiders; here a group
of one. H4, starting values: tests/wire/test_processes.py, tests/optimizers/misuse;
here broadcasts from other workers. H5, the mean: here.
"""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from efsgd import PowerSGDOptimizer
from efsgd.testing import step_together
from tests.optimizers.swap_in.pairs import FULL_RANK, UNCOMPRESSED, gradients, random_tensor, start
from tests.simulation import (
    bits,
    broadcast,
    difference,
    make_workers,
    parameters_of,
    replicated,
    set_gradients,
    step_with,
)

COMPRESSED = {"rank": 1, "min_compression_rate": 0.0}


def values() -> list[Tensor]:
    return [p.detach() for p in start()]


def assert_equal_workers(workers: list[PowerSGDOptimizer]) -> None:
    expected = replicated(workers[0])
    assert all(replicated(worker) == expected for worker in workers[1:])


def different_gradients(step: int, world_size: int) -> list[list[Tensor | None]]:
    """Of each worker its own, of very different sizes."""
    return [
        [10.0**worker * g for g in gradients(start(), 10 * step + worker)]
        for worker in range(world_size)
    ]


def test_accumulated_gradients() -> None:
    """H1: several backward passes before a step, of another number on every worker."""
    workers = make_workers(values(), 3, lr=0.1, momentum=0.9, **COMPRESSED)
    traces = []
    for step in range(3):
        for worker, optimizer in enumerate(workers):
            optimizer.zero_grad()
            for part in range(1 + worker):
                made = gradients(start(), 100 * step + 10 * worker + part)
                for p, g in zip(parameters_of(optimizer), made, strict=True):
                    (p * g).sum().backward()
        traces.append(step_together(workers)[-2:])
        assert_equal_workers(workers)
    assert traces[0] == traces[1] == traces[2]


@pytest.mark.parametrize("who", [{0}, {2}, {0, 1, 2}])
def test_skipped_steps(who: set[int]) -> None:
    """H1: a gradient that overflows on any worker is skipped by all, which stay equal."""
    workers = make_workers(values(), 3, lr=0.1, momentum=0.9, **COMPRESSED)
    for step in range(4):
        set_gradients(workers, different_gradients(step, 3))
        for worker, optimizer in enumerate(workers):
            # What torch.amp.GradScaler leaves for a step; scales may differ between workers.
            is_bad = step == 1 and worker in who
            optimizer.grad_scale = torch.tensor(2.0**worker)
            optimizer.found_inf = torch.tensor(float(is_bad))
        step_together(workers)
        assert_equal_workers(workers)
    assert [worker.param_groups[0]["step"] for worker in workers] == [3, 3, 3]


def test_a_group_of_one() -> None:
    """H3: given explicitly, it is as no group at all."""
    ends = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for group in (None, dist.group.WORLD, dist.new_group([0])):
            optimizer = make_workers(values(), 1, process_group=group, lr=0.1, **COMPRESSED)[0]
            for step in range(3):
                set_gradients([optimizer], different_gradients(step, 1))
                optimizer.step()
            optimizer.broadcast_parameters()
            ends.append(bits(parameters_of(optimizer)))
    finally:
        dist.destroy_process_group()
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize("source", [0, 2])
def test_broadcast(source: int) -> None:
    """H4: any worker's parameters, in all dtypes and memory formats; then training begins."""
    made = [random_tensor((4, 3, 2, 2), dtype, 3) for dtype in (torch.float64, torch.bfloat16)]
    made.append(random_tensor((4, 3, 2, 2), torch.float32, 4).to(memory_format=torch.channels_last))
    workers = [make_workers([p + w for p in made], 1, lr=0.1, rank=1)[0] for w in range(3)]
    expected = bits(parameters_of(workers[source]))
    strides = [p.stride() for p in parameters_of(workers[0])]
    broadcast(workers, source)
    assert all(bits(parameters_of(worker)) == expected for worker in workers)
    assert [p.stride() for p in parameters_of(workers[0])] == strides
    step_with(workers, [[random_tensor(p.shape, p.dtype, w) for p in made] for w in range(3)])
    assert_equal_workers(workers)


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("extra", [UNCOMPRESSED, FULL_RANK], ids=["off", "full rank"])
def test_mean(extra: dict[str, Any], world_size: int) -> None:
    """H5: every worker counts the same, and a missing gradient as zero."""
    workers = make_workers([p.double() for p in values()], world_size, lr=1.0, **extra)
    given: list[list[Tensor | None]] = [
        [None if g is None else g.double() for g in own]
        for own in different_gradients(0, world_size)
    ]
    given[1][4] = None
    step_with(workers, given)
    for index, (p, before) in enumerate(zip(parameters_of(workers[0]), values(), strict=True)):
        present = [own[index] for own in given if own[index] is not None]
        mean = torch.stack(present).sum(0) / world_size
        assert difference(p, before.double() - mean) < 1e-13  # rounding in float64


@pytest.mark.parametrize("extra", [UNCOMPRESSED, COMPRESSED], ids=["off", "rank 1"])
def test_one_batch_in_several_ways(extra: dict[str, Any]) -> None:
    """H5: how equal batches are spread over workers does not matter."""
    made = [p.double() for p in values()]
    runs = []
    for world_size in (1, 2, 4):
        workers = make_workers(made, world_size, lr=0.1, momentum=0.9, **extra)
        for step in range(4):
            parts = [gradients(made, 10 * step + part) for part in range(4)]
            share = 4 // world_size
            given: list[list[Tensor | None]] = [
                [torch.stack(own).mean(0) for own in
                 zip(*parts[w * share : (w + 1) * share], strict=True)]
                for w in range(world_size)
            ]  # fmt: skip
            step_with(workers, given)
        runs.append(parameters_of(workers[0]))
    for other in runs[1:]:
        for p, q in zip(runs[0], other, strict=True):
            assert difference(p, q) < 1e-11  # sums in another order, in float64, over four steps


def test_weighted_mean() -> None:
    """H5: with weights of batches that differ in size, it is one worker's step on all of them."""
    sizes = [1, 2, 5]
    inputs = random_tensor((8, 6), torch.float64, 3)
    targets = random_tensor((8, 5), torch.float64, 4)
    begin = [random_tensor((5, 6), torch.float64, 5), random_tensor((5,), torch.float64, 6)]
    workers = make_workers(begin, 3, lr=0.1, momentum=0.9, **COMPRESSED)
    alone = make_workers(begin, 1, lr=0.1, momentum=0.9, **COMPRESSED)

    def loss(optimizer: PowerSGDOptimizer, rows: slice) -> Tensor:
        weight, bias = parameters_of(optimizer)
        return torch.nn.functional.mse_loss(inputs[rows] @ weight.T + bias, targets[rows])

    for _ in range(4):
        first = 0
        for optimizer, size in zip(workers, sizes, strict=True):
            optimizer.zero_grad()
            loss(optimizer, slice(first, first + size)).backward()
            optimizer.weight = size * len(sizes) / sum(sizes)
            first += size
        alone[0].zero_grad()
        loss(alone[0], slice(None)).backward()
        step_together(workers)
        alone[0].step()
        assert_equal_workers(workers)
        for p, q in zip(parameters_of(workers[0]), parameters_of(alone[0]), strict=True):
            assert difference(p, q) < 1e-12  # sums in another order, in float64
