"""One worker of a network benchmark: measures what it is told to. Started by `namespaces.Network`.

Its only argument is a JSON file::

    workload      a key of `WORKLOADS`; null where nothing is stepped
    candidates    fields of `Candidate`, one object each
    rounds        how many are measured
    warm_up       how many come before
    epfml         a clone of epfml/powersgd, or null
    timeout       seconds, for every wait
    output        where worker 0 writes {"samples": ..., "bytes_sent": ...}

A sample is the time of the slowest worker in that round: a step lasts until all have done it.
"""

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from benchmarks.candidates import Bench, Candidate, use_epfml
from benchmarks.timing import clock_for, measure
from benchmarks.workloads import made_gradients, shapes_of

__all__: list[str] = []


def slowest(samples: dict[str, list[float]]) -> dict[str, list[float]]:
    """For each candidate and round the largest sample of all workers."""
    largest = torch.tensor(list(samples.values()), dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return dict(zip(samples, largest.tolist(), strict=True))


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Measures the candidates of a job, together with the other workers."""
    use_epfml(None if job["epfml"] is None else Path(job["epfml"]))
    shapes = [(1,)] if job["workload"] is None else shapes_of(job["workload"])
    bench = Bench(made_gradients(shapes, dist.get_rank()))
    candidates = [Candidate.from_json(fields) for fields in job["candidates"]]
    runners = {candidate.name: bench.runner(candidate) for candidate in candidates}
    console = Console(stderr=True)
    hidden = dist.get_rank() > 0 or not console.is_terminal
    with Progress(console=console, disable=hidden, transient=True) as progress:
        task = progress.add_task("rounds", total=job["rounds"] + job["warm_up"])
        samples = measure(
            runners,
            job["rounds"],
            warm_up=job["warm_up"],
            clock=clock_for(torch.device("cpu")),
            barrier=dist.barrier,
            after_round=lambda: progress.advance(task),
        )
    bytes_sent = {
        name: optimizer.communication_stats()["bytes_sent"]
        for name, optimizer in bench.optimizers.items()
    }
    return {"samples": slowest(samples), "bytes_sent": bytes_sent}


def work(run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Joins the other workers of the job on the command line, and runs it together with them."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=job["timeout"]))
    found = run(job)
    if dist.get_rank() == 0:
        Path(job["output"]).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    work(run)
