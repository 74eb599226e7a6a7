"""What exchange and update cost on a network of a given rate, beside SGD and beside the peers.

    python -m benchmarks.network --workload resnet18 --rate 1gbit

Each worker is a process in a network namespace of its own, so this needs Linux, root and iproute2.
A step is forward and backward of a module that makes its gradients at no cost, exchange, and
update; *exchange + update* is that less forward and backward alone, in the same round.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.candidates import Candidate, compared, knows_compile, left_out, use_epfml
from benchmarks.memory_budget import available_memory, sessions
from benchmarks.namespaces import (
    MissingPrerequisite,
    Network,
    WorkerFailure,
    bytes_per_second,
    check_prerequisites,
    checked_rate,
)
from benchmarks.results import (
    commit_of,
    describe_machine,
    in_milliseconds,
    in_times,
    show,
    write_results,
)
from benchmarks.timing import Quartiles, compare
from benchmarks.workloads import WORKLOADS, shapes_of

BASELINE, FLOOR = Candidate("ddp-sgd"), Candidate("floor")
WARM_UP = 4  # DDP rebuilds its buckets, the hook begins to compress, efsgd compares its workers
MEMORY_SHARE = 0.8  # of what is free
SMALL_MESSAGE = 1024  # bytes: a message whose size does not matter


def arguments_of(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.network", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--workers", type=int, default=2, help="how many (default: 2)")
    parser.add_argument(
        "--rate", type=checked_rate, default="1gbit", help="of each link, as for tc, or unlimited"
    )
    parser.add_argument("--workload", choices=WORKLOADS, default="resnet18")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], metavar="R")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each candidate")
    parser.add_argument(
        "--only", nargs="+", metavar="KIND", help="of hook, hook-batched, epfml, efsgd"
    )
    parser.add_argument("--compiled", action="store_true", help="efsgd with compile=True, too")
    parser.add_argument("--epfml", type=Path, metavar="DIR", help="a clone of epfml/powersgd")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for each launch")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the samples there")
    return parser.parse_args(command_line)


def link_probes(rate: str) -> tuple[Candidate, Candidate]:
    """All-reduces of a small and of a large message; the large one takes at least 50 ms."""
    large = min(8e6, max(1e6, 0.05 * bytes_per_second(rate)))
    sizes = SMALL_MESSAGE, int(large) // 4096 * 4096
    small, large_one = (Candidate("all-reduce", nbytes=(size,)) for size in sizes)
    return small, large_one


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Samples of each launch."""
    parameter_bytes = 4 * sum(map(math.prod, shapes_of(arguments.workload)))
    share = MEMORY_SHARE * available_memory(torch.device("cpu")) / arguments.workers
    always = [FLOOR, *link_probes(arguments.rate), BASELINE]
    listed = compared(
        arguments.ranks,
        arguments.only,
        compiled=arguments.compiled and knows_compile(),
        epfml=arguments.epfml is not None,
    )
    found = []
    with Network(arguments.workers, arguments.rate) as network:
        for candidates in sessions(listed, parameter_bytes, share, always):
            job = {
                "workload": arguments.workload,
                "candidates": [asdict(candidate) for candidate in candidates],
                "rounds": arguments.rounds,
                "warm_up": WARM_UP,
                "epfml": None if arguments.epfml is None else str(arguments.epfml.resolve()),
            }
            launch = network.run(job, arguments.timeout)
            found.append({"candidates": job["candidates"], **launch})
            show_session(arguments, launch["samples"])
    return found


def show_session(arguments: argparse.Namespace, samples: dict[str, list[float]]) -> None:
    """Prints the tables of one launch."""
    title = f"{WORKLOADS[arguments.workload]}, {arguments.workers} workers, {arguments.rate}"
    probes = [name for name in samples if name.startswith("all-reduce")]
    times = [(name, in_milliseconds(Quartiles.of(samples[name]))) for name in probes]
    show(f"{title}: the link", ("", "ms"), times)
    steps = {name: seconds for name, seconds in samples.items() if name not in probes}
    rows = [
        (row.name, in_milliseconds(row.whole), in_milliseconds(row.net), in_times(row.gain))
        for row in compare(steps, floor=FLOOR.name, baseline=BASELINE.name)
    ]
    show(title, ("", "step, ms", "exchange + update, ms", "faster than SGD"), rows)


def main() -> int:
    """Entry point."""
    arguments = arguments_of()
    reasons = left_out(compiled=arguments.compiled, epfml=arguments.epfml is not None)
    try:
        check_prerequisites()
        use_epfml(arguments.epfml)
        for reason in reasons:
            print(f"Left out: {reason}", flush=True)
        launches = measured(arguments)
    except (MissingPrerequisite, FileNotFoundError) as missing:
        print(missing, file=sys.stderr)
        return 2
    except WorkerFailure as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    settings = {
        "workload": arguments.workload,
        "workers": arguments.workers,
        "rate": arguments.rate,
        "rounds": arguments.rounds,
        "epfml": None if arguments.epfml is None else commit_of(arguments.epfml),
        "left_out": reasons,
    }
    machine = describe_machine(threads=1)
    write_results(arguments.output, "network", machine, settings, {"launches": launches})
    return 0


if __name__ == "__main__":
    sys.exit(main())
