"""A training program in several workers, which are threads of one process."""

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch._dynamo  # two threads would load it at once, with their first optimizers
from torch import Tensor, nn

from tests.simulation import bits
from tests.wire.test_transports import Threads

WORKERS = 2

_GENERATOR = threading.Lock()  # torch's is one for all threads


def together(work: Callable[[Threads], Any], workers: int = WORKERS) -> list[Any]:
    """What each of the workers returns; who raises, raises for all."""
    table: list[Tensor | None] = [None] * workers
    barrier = threading.Barrier(workers)

    def run(worker: int) -> Any:
        try:
            return work(Threads(table, barrier, worker))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, worker) for worker in range(workers)]
        errors = [future.exception() for future in futures]
    raised = [e for e in errors if e is not None and "BrokenBarrier" not in repr(e)]
    if raised:
        raise raised[0]
    return [future.result() for future in futures]


class Model(nn.Module):
    """Two matrices that are one, a frozen layer, a buffer, and a layer that only some use."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with _GENERATOR, torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self.first, self.norm = nn.Linear(12, 12), nn.BatchNorm1d(12)
            self.tied, self.side = nn.Linear(12, 12), nn.Linear(12, 9)
            self.fixed = nn.Linear(12, 12).requires_grad_(False)
        self.tied.weight = self.first.weight

    def forward(self, inputs: Tensor, *, uses_side: bool = True) -> Tensor:
        hidden = self.tied(self.fixed(self.norm(self.first(inputs)).tanh()).tanh())
        return self.side(hidden) if uses_side else hidden


def loss_of(model: nn.Module, worker: int, step: int) -> Tensor:
    """Of this worker's batch; no worker uses the side in step 2, and only the first in step 1."""
    generator = torch.Generator().manual_seed(1000 * step + worker)
    dtype = next(model.parameters()).dtype
    inputs = torch.randn(8, 12, generator=generator).to(dtype)
    loss: Tensor = model(inputs, uses_side=step != 2 and (step != 1 or worker == 0)).square().mean()
    return loss


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """The bits of what was trained, and of the optimizer's state."""
    return bits(copy.deepcopy([list(model.parameters()), optimizer.state_dict()]))


def parameters(model: nn.Module) -> Any:
    return bits([*model.parameters()])


def all_equal(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)
