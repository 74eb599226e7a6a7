"""What a step costs on one worker, where nothing is sent: beside SGD and beside the peers.

    python -m benchmarks.local --workload resnet18

All candidates step with the same gradients. A copy of as many bytes as the parameters have is
measured in the same rounds: what a step takes can be told in such copies, on any machine.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress

from benchmarks.candidates import Bench, Candidate, compared, knows_compile, left_out, use_epfml
from benchmarks.device_activity import device_activity
from benchmarks.memory_budget import available_memory, sessions
from benchmarks.results import (
    commit_of,
    describe_machine,
    in_milliseconds,
    in_times,
    show,
    write_results,
)
from benchmarks.timing import Quartiles, clock_for, compare, differences, measure, ratios
from benchmarks.workloads import WORKLOADS, made_gradients, shapes_of

__all__: list[str] = []

FLOOR, COPY, BASELINE = Candidate("floor"), Candidate("copy"), Candidate("sgd-foreach")
ALWAYS = (FLOOR, COPY, BASELINE, Candidate("sgd-loop"), Candidate("sgd-fused"))
WARM_UP = 4
MEMORY_SHARE = 0.8  # of what is free


def arguments_of(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.local", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--workload", choices=WORKLOADS, default="resnet18")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 32], metavar="R")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each candidate")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument(
        "--thread-time",
        action="store_true",
        help="CPU time of one thread, where others are at work",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--only", nargs="+", metavar="KIND", help="of hook, hook-batched, epfml, efsgd"
    )
    parser.add_argument("--eager", action="store_true", help="efsgd without compile=True only")
    parser.add_argument("--epfml", type=Path, metavar="DIR", help="a clone of epfml/powersgd")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the samples there")
    return parser.parse_args(command_line)


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Samples of each session."""
    device = torch.device(arguments.device)
    shapes = shapes_of(arguments.workload)
    gradients = made_gradients(shapes)
    listed = compared(
        arguments.ranks,
        arguments.only,
        compiled=not arguments.eager and knows_compile(),
        epfml=arguments.epfml is not None,
    )
    memory = MEMORY_SHARE * available_memory(device)
    found = []
    for candidates in sessions(listed, 4 * sum(map(math.prod, shapes)), memory, ALWAYS):
        bench = Bench(gradients, device)
        runners = {candidate.name: bench.runner(candidate) for candidate in candidates}
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("rounds", total=arguments.rounds + WARM_UP)
            samples = measure(
                runners,
                arguments.rounds,
                warm_up=WARM_UP,
                clock=clock_for(device, of_thread=arguments.thread_time),
                after_round=lambda bar=progress, task=task: bar.advance(task),
            )
        found.append({"candidates": list(map(asdict, candidates)), "samples": samples})
        if device.type == "cuda":
            found[-1]["activity"] = {n: device_activity(r) for n, r in runners.items()}
        show_session(arguments, samples)
    return found


def show_session(arguments: argparse.Namespace, samples: dict[str, list[float]]) -> None:
    """Prints the table of one session."""
    copies = samples[COPY.name]
    steps = {name: seconds for name, seconds in samples.items() if name != COPY.name}
    rows = [(COPY.name, in_milliseconds(Quartiles.of(copies)), "", "")]
    for row in compare(steps, floor=FLOOR.name, baseline=BASELINE.name):
        net = differences(samples[row.name], samples[FLOOR.name])
        in_copies = in_times(Quartiles.of(ratios(net, copies)))
        rows.append((row.name, in_milliseconds(row.net), in_times(row.cost), in_copies))
    title = f"{WORKLOADS[arguments.workload]}, one worker, {arguments.threads} thread(s)"
    show(title, ("", "step, ms", "of SGD's time", "of a copy's time"), rows)


def main() -> int:
    """Entry point."""
    arguments = arguments_of()
    try:
        use_epfml(arguments.epfml)
    except FileNotFoundError as missing:
        print(missing, file=sys.stderr)
        return 2
    reasons = left_out(compiled=not arguments.eager, epfml=arguments.epfml is not None)
    for reason in reasons:
        print(f"Left out: {reason}", flush=True)
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    launches = measured(arguments)
    dist.destroy_process_group()
    settings = {
        "workload": arguments.workload,
        "rounds": arguments.rounds,
        "device": arguments.device,
        "epfml": None if arguments.epfml is None else commit_of(arguments.epfml),
        "left_out": reasons,
    }
    machine = describe_machine(arguments.threads, arguments.device)
    write_results(arguments.output, "local", machine, settings, {"launches": launches})
    return 0


if __name__ == "__main__":
    sys.exit(main())
