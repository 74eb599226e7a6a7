"""One worker of `benchmarks.whole_steps`: forward, backward, exchange and update of real models.

`namespaces.Network` starts it. Its only argument is a JSON file::

    rounds        how many steps of each candidate are measured
    warm_up       how many come before
    timeout       seconds, for every wait
    output        where worker 0 writes the samples, by task and candidate
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.timing import Runner, clock_for, measure
from benchmarks.worker import slowest, work
from examples.baseline import sgd
from examples.builtin import DIGITS, TOPICS, digits_task, topics_task
from examples.compare_ranks import powersgd
from examples.distributed import Workers

TASKS: dict[str, Any] = {
    "CNN on scikit-learn's digits": (DIGITS, digits_task),
    "LSTM on Python's help topics": (TOPICS, topics_task),
}
METHODS: dict[str, Any] = {
    "SGD under DDP": sgd,
    **{f"rank {rank}": partial(powersgd, rank=rank) for rank in (1, 2, 4)},
}


def step_of(task_name: str, method: str, workers: Workers) -> Callable[[], object]:
    """A whole step of a method on a task, each time with the next batch."""
    settings, make = TASKS[task_name]
    torch.manual_seed(1)
    task, model = make(settings.batch_size, workers)
    model, optimizer = METHODS[method](model, settings, 1, workers)
    batches = itertools.chain.from_iterable(task.batches(1, epoch) for epoch in itertools.count())

    def step() -> None:
        batch = next(batches)
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()

    return step


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Measures all methods on each task, together with the other workers."""
    workers = Workers(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    found = {}
    for task in TASKS:
        runners = {method: Runner(step_of(task, method, workers)) for method in METHODS}
        samples = measure(
            runners,
            job["rounds"],
            warm_up=job["warm_up"],
            clock=clock_for(torch.device("cpu")),
            barrier=dist.barrier,
        )
        found[task] = slowest(samples)
    return found


if __name__ == "__main__":
    work(run)
