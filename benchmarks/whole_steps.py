"""Whole steps of the examples' models, forward and backward included, on a slow network.

    python -m benchmarks.whole_steps --rate 100mbit

Each worker is a process with one core in a network namespace of its own, so this needs Linux, root
and iproute2. Batches, models and hyper-parameters are those of examples/compare_ranks.py.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.namespaces import checked_rate, measured
from benchmarks.results import describe_machine, in_milliseconds, in_times, show, write_results
from benchmarks.timing import Quartiles, ratios

WARM_UP = 5  # workers compare what they train, DDP rebuilds its buckets


def main(command_line: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_steps", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--workers", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--rate", type=checked_rate, default="100mbit", help="as for tc")
    parser.add_argument("--rounds", type=int, default=41, help="measured steps of each candidate")
    parser.add_argument("--timeout", type=float, default=600, help="seconds")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the samples there")
    arguments = parser.parse_args(command_line)
    job = {"module": "benchmarks.whole_steps_worker", "rounds": arguments.rounds}
    job["warm_up"] = WARM_UP
    found = measured(arguments.workers, arguments.rate, job, arguments.timeout)
    for task, samples in found.items():
        baseline = next(iter(samples.values()))
        rows = [
            (
                name,
                in_milliseconds(Quartiles.of(seconds)),
                in_times(Quartiles.of(ratios(baseline, seconds))),
            )
            for name, seconds in samples.items()
        ]
        title = f"{task}, {arguments.workers} workers, {arguments.rate}: a whole step"
        show(f"{title}; median (quartiles)", ("", "ms", "faster than SGD"), rows)
    settings = {"workers": arguments.workers, "rate": arguments.rate, "rounds": arguments.rounds}
    write_results(arguments.output, "whole_steps", describe_machine(1), settings, found)


if __name__ == "__main__":
    main()
