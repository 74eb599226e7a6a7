"""A transport of one's own is taken wherever a process group is."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efsgd import GradientAverager, PowerSGDOptimizer, average_buffers
from efsgd.testing import step_together
from efsgd.wire.collectives import AllReduceMean, Collective
from efsgd.wire.transports import Alone, transport_of

WORKERS = 3


class Threads:
    """Workers that are threads of one process, each with a place at a shared table."""

    def __init__(self, table: list[Tensor | None], barrier: threading.Barrier, worker: int) -> None:
        self.world_size, self.worker = len(table), worker
        self.group = "of threads"  # of no concern to anybody else
        self._table, self._barrier = table, barrier

    def start(self, collective: Collective) -> Callable[[], Tensor]:
        self._table[self.worker] = collective.buffer.clone()
        self._barrier.wait(60)
        buffers = [buffer for buffer in self._table if buffer is not None]
        answer = collective.combine(buffers)[self.worker].clone()
        self._barrier.wait(60)
        if collective.writes_buffer:
            answer = collective.buffer.copy_(answer)
        return lambda: answer


def together(work: Callable[[Threads], Any]) -> list[Any]:
    """What each of the workers returns."""
    table: list[Tensor | None] = [None] * WORKERS
    barrier = threading.Barrier(WORKERS)
    with ThreadPoolExecutor(WORKERS) as pool:
        transports = [Threads(table, barrier, worker) for worker in range(WORKERS)]
        return list(pool.map(work, transports))


def a_model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 10), nn.BatchNorm1d(10))


def set_gradients(model: nn.Module, worker: int, step: int) -> None:
    generator = torch.Generator().manual_seed(10 * step + worker)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_an_optimizer_takes_the_steps_that_it_takes_in_lockstep() -> None:
    models = [a_model() for _ in range(WORKERS)]
    optimizers = [PowerSGDOptimizer(m.parameters(), 0.1, 0.9, rank=2) for m in models]
    for step in range(3):
        for worker, model in enumerate(models):
            set_gradients(model, worker, step)
        step_together(optimizers)
    threads = [a_model() for _ in range(WORKERS)]

    def train(transport: Threads) -> dict[str, Any]:
        model = threads[transport.worker]
        optimizer = PowerSGDOptimizer(model.parameters(), 0.1, rank=2, momentum=0.9)
        optimizer.process_group = transport
        assert optimizer.transport is transport
        for step in range(3):
            set_gradients(model, transport.worker, step)
            optimizer.step()
        optimizer.compare_workers()
        optimizer.broadcast_parameters()
        return optimizer.communication_stats()

    stats = together(train)
    for model, expected in zip(threads, models, strict=True):
        for own, other in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(own, other)
    for name in ("collectives", "bytes_sent", "steps"):
        assert stats[0][name] == optimizers[0].communication_stats()[name]


def test_an_averager_and_buffers_take_it_as_well() -> None:
    models = [a_model() for _ in range(WORKERS)]
    for worker, model in enumerate(models):
        model[1].running_mean += worker

    def average(transport: Threads) -> None:
        model = models[transport.worker]
        set_gradients(model, transport.worker, 0)
        GradientAverager(model.parameters(), process_group=transport).average_()
        average_buffers(model, transport)

    together(average)
    first = models[0]
    assert torch.equal(first[1].running_mean, torch.full((10,), 1.0))
    for model in models[1:]:
        pairs = zip(first.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(own.grad, other.grad) for own, other in pairs)


def test_one_worker_is_alone_and_what_is_no_transport_is_refused() -> None:
    alone = Threads([None], threading.Barrier(1), 0)
    assert isinstance(transport_of(alone), Alone)
    assert transport_of(alone).start(AllReduceMean(torch.ones(2), "a test"))().tolist() == [1, 1]
    with pytest.raises(TypeError, match=r"Invalid process_group: 3.*Transport, or None"):
        PowerSGDOptimizer([torch.zeros(2, requires_grad=True)], process_group=3)
