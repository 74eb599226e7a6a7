"""The group of workers a script runs in: many under torchrun, one without it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes


@dataclass(frozen=True)
class Workers:
    """All workers, seen from one of them.

    Attributes:
        worker: number of this worker.
        world_size: number of workers.
        device: where this worker computes.
    """

    worker: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this worker writes the files and shows the progress."""
        return self.worker == 0

    def sum(self, *values: float) -> list[float]:
        """Sums of these numbers over all workers, the same on every worker."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each worker has given, in worker order, the same on every worker."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


@contextmanager
def join_workers(
    init_method: str = "env://", timeout: timedelta | None = None
) -> Iterator[Workers]:
    """Joins the workers that torchrun started, and leaves them at the end.

    Without torchrun's variables in the environment there is one worker and no process group.

    Args:
        init_method: where the workers find each other, as in torch.distributed.
        timeout: how long a worker waits for another; None is torch.distributed's own choice.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    worker = int(os.environ.get("RANK", 0))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size == 1:
        yield Workers(0, 1, device)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, _, _ = next(dist.rendezvous(init_method, worker, world_size))
    # torchrun keeps one store through all restarts: who finds an address of the last life in it
    # tries to connect to a dead worker, until the time-out.
    store = dist.PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group(
        backend, timeout=timeout, store=store, rank=worker, world_size=world_size
    )
    try:
        yield Workers(worker, world_size, device)
    finally:
        dist.destroy_process_group()


def start_workers(work: Callable[..., None], given: tuple[Any, ...], world_size: int) -> None:
    """Runs a function in that many processes of this machine, and waits for all of them.

    Loading torch takes each of them seconds of a core, more than a short training. So they are
    forked from this process, which has loaded it, where that is safe: on Linux, as long as this
    process has computed nothing itself.

    Args:
        work: called with the number of the worker, and `given`.
        given: further arguments.
        world_size: number of workers.
    """
    method = "spawn"
    if sys.platform == "linux":
        method = "fork"
        import torch._dynamo  # noqa: F401 (else the first optimizer in each would load it)
    start_processes(work, given, nprocs=world_size, start_method=method)
