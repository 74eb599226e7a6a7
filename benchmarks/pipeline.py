"""What a schedule step of a pipeline costs on links of a given rate, beside torch's own stage.

    python -m benchmarks.pipeline --rate 100mbit

Each stage is a process in a network namespace of its own, so this needs Linux, root and iproute2.
Stages compute next to nothing: what is measured is what travels, and how it is packed. The floor is
what the bytes of one boundary take on the link, forwards and then backwards.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.namespaces import bytes_per_second, checked_rate, measured
from benchmarks.pipeline_worker import TORCH
from benchmarks.results import describe_machine, in_milliseconds, in_times, show, write_results
from benchmarks.timing import Quartiles, ratios

#: A microbatch of the language model: 8 texts of 64 words, 650 features.
BOUNDARY = (8, 64, 650)


def report(title: str, rate: str, found: dict[str, Any], steps: int) -> None:
    """Shows the table of one launch."""
    rows = []
    for name, seconds in found["samples"].items():
        own = found["stats"].get(name)
        nbytes = 0 if own is None else own["forward_bytes_sent"] + found["back"][name]
        floor = nbytes / steps / bytes_per_second(rate)
        rows.append(
            (
                name,
                in_milliseconds(Quartiles.of(seconds)),
                in_times(Quartiles.of(ratios(found["samples"][TORCH], seconds))),
                "" if own is None else f"{nbytes / steps / 1e6:.2f}",
                "" if own is None else f"{1e3 * floor:.1f}",
                f"{1e3 * found['packing'][name]:.2f}",
            )
        )
    columns = ("", "ms", "faster than torch's", "MB", "floor, ms", "packing a microbatch, ms")
    show(title, columns, rows)


def main(command_line: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--stages", type=int, default=2, help="how many (default: 2)")
    parser.add_argument("--microbatches", type=int, default=4, help="in a step (default: 4)")
    parser.add_argument("--rate", type=checked_rate, default="100mbit", help="as for tc")
    parser.add_argument("--rounds", type=int, default=11, help="measured steps of each candidate")
    parser.add_argument("--timeout", type=float, default=600, help="seconds")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the samples there")
    arguments = parser.parse_args(command_line)
    warm_up = 2
    job = {
        "module": "benchmarks.pipeline_worker",
        "shape": list(BOUNDARY),
        "microbatches": arguments.microbatches,
        "rounds": arguments.rounds,
        "warm_up": warm_up,
    }
    found = measured(arguments.stages, arguments.rate, job, arguments.timeout)
    counts = f"{arguments.stages} stages, {arguments.microbatches} microbatches"
    title = f"{counts} of {list(BOUNDARY)}, {arguments.rate}: a step; median (quartiles)"
    report(title, arguments.rate, found, warm_up + arguments.rounds)
    settings = {"shape": BOUNDARY, "rate": arguments.rate, "stages": arguments.stages}
    settings |= {"microbatches": arguments.microbatches, "rounds": arguments.rounds}
    write_results(arguments.output, "pipeline", describe_machine(1), settings, found)


if __name__ == "__main__":
    main()
