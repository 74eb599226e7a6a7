"""The most memory that is allocated beyond parameters and gradients, by construction and steps.

    python -m benchmarks.memory --workload resnet18

Each candidate runs in a process of its own, on one worker. On the CPU the profiler of torch reports
every allocation of a tensor, and their sum is exact; the resident memory of another process, which
is not profiled and gives freed memory back to the system at once, is there to confirm it. On CUDA
the allocator counts.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.progress import track
from torch.profiler import ProfilerActivity, profile

from benchmarks.candidates import Bench, Candidate, compared, knows_compile, left_out, use_epfml
from benchmarks.results import commit_of, describe_machine, show, write_results
from benchmarks.workloads import WORKLOADS, made_gradients, shapes_of

SGD = [Candidate(kind) for kind in ("sgd-foreach", "sgd-loop", "sgd-fused", "ddp-sgd")]
STEPS = 5  # the hook compresses from the third on
LIMIT = 900  # seconds for one process
# Enough for every kind of candidate to do all it does, so that all modules are loaded.
TINY = [(64, 32), (64,)]


def arguments_of(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--workload", choices=WORKLOADS, default="resnet18")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4], metavar="R")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--only", nargs="+", metavar="KIND", help="of hook, hook-batched, epfml, efsgd"
    )
    parser.add_argument("--eager", action="store_true", help="efsgd without compile=True only")
    parser.add_argument("--epfml", type=Path, metavar="DIR", help="a clone of epfml/powersgd")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # method and candidate
    return parser.parse_args(command_line)


def peak_of(changes: Sequence[int]) -> tuple[int, int]:
    """The largest of the running sums of some allocations and releases, and the last.

    Args:
        changes: bytes in order of time, negative where they are released.

    Example:
        >>> peak_of([4, 8, -4, 2, -8])
        (12, 2)
    """
    total = peak = 0
    for change in changes:
        total += change
        peak = max(peak, total)
    return peak, total


def profiled(run: Callable[[], object]) -> dict[str, int]:
    """Peak and remainder of the tensors' bytes on the CPU, as the profiler sees them.

    It sees those of one thread. So collectives end before the program goes on, and what is to
    follow them, such as the rest of a hook, does so in the same thread.
    """

    def all_reduce(*args: Any, **options: Any) -> Any:
        work = reduce_now(*args, **options)
        if work is not None:
            work.wait()
        return work

    reduce_now = dist.all_reduce
    with (
        mock.patch.object(dist, "all_reduce", all_reduce),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        kept = run()
    recorded = profiler.profiler.kineto_results.events()
    events = [event for event in recorded if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    peak, remainder = peak_of([event.nbytes() for event in events])
    del kept
    return {"peak": peak, "kept": remainder}


def resident(run: Callable[[], object]) -> dict[str, int]:
    """Peak of this process' resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _status("VmRSS")
    run()
    return {"resident": _status("VmHWM") - before}


def on_cuda(run: Callable[[], object]) -> dict[str, int]:
    """Peak and remainder of what torch's allocator has handed out on CUDA."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    found = {
        "peak": torch.cuda.max_memory_allocated() - before,
        "kept": torch.cuda.memory_allocated() - before,
    }
    del kept
    return found


METHODS = {"profiled": profiled, "resident": resident, "cuda": on_cuda}


def measure_one(arguments: argparse.Namespace) -> dict[str, int]:
    """What one candidate takes, in bytes; in a process that does nothing else."""
    method, fields = arguments.one
    candidate = Candidate.from_json(json.loads(fields))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not candidate.compiled:
        _construct_and_step(Bench(made_gradients(TINY), arguments.device), candidate)
    bench = Bench(made_gradients(shapes_of(arguments.workload)), arguments.device)
    module = bench.module(candidate)
    module.prepare()  # what the system gives only when it is written to is there before
    found = METHODS[method](lambda: _construct_and_step(bench, candidate, module))
    dist.destroy_process_group()
    return found


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of all candidates, as multiples of the parameters' bytes."""
    compiled, epfml = not arguments.eager and knows_compile(), arguments.epfml is not None
    listed = SGD + compared(arguments.ranks, arguments.only, compiled=compiled, epfml=epfml)
    methods = ("cuda",) if arguments.device == "cuda" else ("profiled", "resident")
    parameter_bytes = 4 * sum(map(math.prod, shapes_of(arguments.workload)))
    found = []
    for candidate in track(listed, "candidates", transient=True):
        figures: dict[str, int] = {}
        for method in methods:
            # A compiler is of another size than what it compiles.
            if not (method == "resident" and candidate.compiled):
                figures |= _in_new_process(arguments, method, candidate)
        multiples = {name: count / parameter_bytes for name, count in figures.items()}
        found.append({"name": candidate.name, "candidate": asdict(candidate), **multiples})
    return found


def main() -> int:
    """Entry point."""
    arguments = arguments_of()
    try:
        use_epfml(arguments.epfml)
    except FileNotFoundError as missing:
        print(missing, file=sys.stderr)
        return 2
    if arguments.one:
        print(json.dumps(measure_one(arguments)))
        return 0
    reasons = left_out(compiled=not arguments.eager, epfml=arguments.epfml is not None)
    for reason in reasons:
        print(f"Left out: {reason}", flush=True)
    found = measured(arguments)
    columns = ("peak", "kept", "resident")
    rows = [
        (row["name"], *(f"{row[c]:.2f}×" if c in row else "" for c in columns)) for row in found
    ]
    title = f"{WORKLOADS[arguments.workload]}: memory beyond parameters and gradients"
    show(title, ("in parameters' bytes", "peak", "between steps", "peak, resident"), rows)
    settings = {
        "workload": arguments.workload,
        "device": arguments.device,
        "steps": STEPS,
        "epfml": None if arguments.epfml is None else commit_of(arguments.epfml),
        "left_out": reasons,
    }
    machine = describe_machine(1, arguments.device)
    write_results(arguments.output, "memory", machine, settings, {"multiples": found})
    return 0


def _construct_and_step(bench: Bench, candidate: Candidate, *module: Any) -> object:
    runner = bench.runner(candidate, *module)
    for _ in range(STEPS):
        runner.prepare()
        runner.step()
    return runner


def _in_new_process(
    arguments: argparse.Namespace, method: str, candidate: Candidate
) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.memory", "--workload", arguments.workload]
    command += ["--device", arguments.device, "--one", method, json.dumps(asdict(candidate))]
    if arguments.epfml is not None:
        command += ["--epfml", str(arguments.epfml)]
    # The C library asks the system for every larger block, and returns it as soon as it is free.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{candidate.name} failed: {done.stderr[-2000:]}")
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    sys.exit(main())
