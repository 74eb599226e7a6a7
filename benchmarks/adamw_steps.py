"""Whole steps of a ResNet18 with AdamW: averaged by DDP, by hooks, before the step, ideally.

    python -m benchmarks.adamw_steps --rate 100mbit

Each worker is a process with one core in a network namespace of its own, so this needs Linux, root
and iproute2. torch's powerSGD_hook has one bucket: with several it stands still on gloo. The ideal
is the longer one of backward pass and exchange, and the rest of a step that sends nothing.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.adamw_steps_worker import BACKWARD, EXCHANGE, FORWARD, NOTHING, PLAIN
from benchmarks.namespaces import checked_rate, measured
from benchmarks.results import describe_machine, in_milliseconds, in_times, show, write_results
from benchmarks.timing import Quartiles, ratios

IDEAL = "ideal"


def ideal(found: dict[str, list[float]]) -> list[float]:
    """Of each round: the longer one of backward pass and exchange, and the rest."""
    parts = zip(*(found[name] for name in (NOTHING, FORWARD, BACKWARD, EXCHANGE)), strict=True)
    return [
        whole - (both - forward) + max(both - forward, exchange)
        for whole, forward, both, exchange in parts
    ]


def main(command_line: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adamw_steps", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--workers", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--rate", type=checked_rate, default="100mbit", help="as for tc")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each candidate")
    parser.add_argument("--timeout", type=float, default=900, help="seconds")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the samples there")
    arguments = parser.parse_args(command_line)
    job = {"module": "benchmarks.adamw_steps_worker", "rounds": arguments.rounds, "warm_up": 3}
    found = measured(arguments.workers, arguments.rate, job, arguments.timeout)
    found[IDEAL] = ideal(found)
    rows = [
        (
            name,
            in_milliseconds(Quartiles.of(seconds)),
            in_times(Quartiles.of(ratios(found[PLAIN], seconds))),
            in_times(Quartiles.of(ratios(seconds, found[IDEAL]))),
        )
        for name, seconds in found.items()
    ]
    title = f"ResNet18, {arguments.workers} workers, {arguments.rate}: a whole step"
    columns = ("", "ms", "faster than DDP", "times the ideal")
    show(f"{title}; median (quartiles)", columns, rows)
    settings = {"workers": arguments.workers, "rate": arguments.rate, "rounds": arguments.rounds}
    write_results(arguments.output, "adamw_steps", describe_machine(1), settings, found)


if __name__ == "__main__":
    main()
