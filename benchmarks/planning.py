"""The planner's predictions, beside whole steps on slow networks; and tables for many workers.

    python -m benchmarks.planning check --output docs/benchmarks/planning.json
    python -m benchmarks.planning tables --output docs/planning-tables.md

`check` needs Linux, root and iproute2: each worker is a process in a network namespace of its own.
They share the cores of one machine, so that forward and backward passes sleep there: what is
checked is what the network, its overlap with the backward pass, and compressing take. The link is
that of two all-reduces, and what compressing takes is that of the same optimizers when nothing
travels, all of them measured in the same rounds on all workers at once.

`tables` computes. Nothing is measured then.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.namespaces import checked_rate, measured
from benchmarks.page import source_of, table
from benchmarks.planning_worker import (
    BACKWARD,
    CANDIDATES,
    FORWARD,
    PLAIN,
    PROBES,
    SHAPES,
    UPDATE,
)
from benchmarks.results import describe_machine, in_milliseconds, show, write_results
from benchmarks.timing import Quartiles
from efsgd.planning import Link, default_candidates
from efsgd.planning.measuring import Work
from efsgd.planning.prediction import Setup
from efsgd.planning.sending import Sending
from efsgd.planning.tensors import KNOWN_SHAPES, trained_of
from efsgd.planning.words import in_bits, in_time

WARM_UP = 2
RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks" / "planning.json"

# What the computed tables assume: round figures, of the size that one slow core has.
ASSUMED_PASSES, ASSUMED_UPDATE = (0.12, 0.28), 0.02
ASSUMED_WORK = {
    "PowerSGD(rank=1)": Work(0.05),
    "PowerSGD(rank=4)": Work(0.06),
    "TopK(density=0.01)": Work(0.15, 0.001),
    "SignNorm()": Work(0.15, 0.04),
}
NETWORKS = ((12.5e6, 1e-3), (125e6, 2e-4), (3.125e9, 2e-5))
MANY_WORKERS = (2, 8, 64, 512, 4096, 10_000)
TRAINED = trained_of(KNOWN_SHAPES["resnet18"]())
SENDINGS = {name: Sending(default_candidates()[name], TRAINED) for name in ASSUMED_WORK}


def predicted(workers: int, samples: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Whole steps of all candidates, from the link and the computing of the same rounds."""

    def median(name: str) -> float:
        return Quartiles.of(samples[name]).median

    small, large = ((nbytes, median(name)) for name, nbytes in PROBES.items())
    link = Link.measured(workers, small, large)
    trained = trained_of(SHAPES)
    setup = Setup(trained, FORWARD, BACKWARD, Work(median(f"compute of {UPDATE}")))
    found = {PLAIN: setup.seconds_of_ddp(link)}
    for name, compressor in CANDIDATES.items():
        work = Work(median(f"compute of {name}"))
        found[name] = setup.seconds_of(Sending(compressor, trained), work, link)
    return found


def rows_of(launch: Mapping[str, Any]) -> Iterator[tuple[str, Quartiles, float]]:
    """Name, measured and predicted seconds of each candidate of a launch."""
    for name, seconds in predicted(launch["workers"], launch["samples"]).items():
        yield name, Quartiles.of(launch["samples"][name]), seconds


def check(arguments: argparse.Namespace) -> None:
    """Measures, predicts, and shows both."""
    launches = []
    for rate in arguments.rates:
        for workers in arguments.workers:
            job = {"module": "benchmarks.planning_worker", "rounds": arguments.rounds}
            job["warm_up"] = WARM_UP
            samples = measured(workers, rate, job, arguments.timeout)
            launches.append({"workers": workers, "rate": rate, "samples": samples})
            columns = ("", "measured, ms", "predicted, ms", "deviation")
            rows = [
                (name, in_milliseconds(each), f"{1e3 * s:.4g}", _deviation(s, each.median))
                for name, each, s in rows_of(launches[-1])
            ]
            show(f"{workers} workers, {rate}: a whole step", columns, rows)
    settings = {"workers": arguments.workers, "rates": arguments.rates, "rounds": arguments.rounds}
    found = {"launches": launches}
    write_results(arguments.output, "planning", describe_machine(1), settings, found)


def _deviation(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.0f} %".replace("-", "−")


def checked_table(result: Mapping[str, Any]) -> str:
    """What `check` has found, as Markdown."""
    launches = result["launches"]
    columns = ("", *(f"{each['workers']} workers, {each['rate']}" for each in launches))
    found = [list(rows_of(launch)) for launch in launches]
    rows = []
    for same in zip(*found, strict=True):
        cells = [
            f"{_ms(measured.median)}, {_ms(seconds)} ({_deviation(seconds, measured.median)})"
            for _, measured, seconds in same
        ]
        rows.append((same[0][0], *cells))
    return table(columns, rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def computed_table(algorithm: str, bandwidth: float, latency: float) -> str:
    """Predicted steps for some numbers of workers, as Markdown."""
    columns = ("workers", PLAIN, *ASSUMED_WORK, "advice")
    rows = []
    for workers in MANY_WORKERS:
        link = Link(workers, latency, bandwidth, algorithm)
        setup = Setup(TRAINED, *ASSUMED_PASSES, Work(ASSUMED_UPDATE))
        steps = {
            name: setup.seconds_of(SENDINGS[name], work, link)
            for name, work in ASSUMED_WORK.items()
        }
        ddp = setup.seconds_of_ddp(link)
        best = min(steps, key=lambda name: steps[name])
        gain = ddp / steps[best]
        advice = f"{best}, {gain:.2g}×" if gain > 1 else "do not compress"
        rows.append((f"{workers:,}", in_time(ddp), *map(in_time, steps.values()), advice))
    return table(columns, rows)


def page() -> str:
    """The generated part of the page."""
    parts = []
    if RESULTS.exists():
        result = json.loads(RESULTS.read_text())
        parts += [
            "Whole steps of a model of 4.2 MB, on 2 to 16 workers in network namespaces, as "
            "`make bench-planning` measures them (Linux, root): measured and predicted, "
            "milliseconds, and the deviation of the prediction. The workers share the cores of "
            "one machine, so passes sleep there, and need none; the link is that of two "
            "all-reduces, and computing that of the same optimizers when nothing travels, in "
            "the same rounds on all workers at once.",
            checked_table(result),
            source_of(result),
        ]
    forward, backward = ASSUMED_PASSES
    work = "; ".join(
        f"`{name}` {in_time(own.step)}"
        + (f", {in_time(own.each_payload)} more for each worker" if own.each_payload else "")
        for name, own in ASSUMED_WORK.items()
    )
    parts += [
        "## Computed: up to 10,000 workers",
        "**These tables are computed, not measured**, by `make planning-tables`: "
        "whole steps of a ResNet18 for CIFAR-10, of which "
        f"a forward pass is taken to take {in_time(forward)}, a backward pass "
        f"{in_time(backward)}, SGD's update {in_time(ASSUMED_UPDATE)}, and besides the passes: "
        f"{work}. The advice names the fastest, and how many times as long DDP takes.",
    ]
    for algorithm in ("ring", "tree"):
        for bandwidth, latency in NETWORKS:
            title = f"**{algorithm}, {in_bits(bandwidth)}, latency {in_time(latency)}**"
            parts += [title, computed_table(algorithm, bandwidth, latency)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main(command_line: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planning", description=__doc__.split("\n")[0]
    )
    kinds = parser.add_subparsers(dest="what", required=True)
    checks = kinds.add_parser("check", help="measure whole steps")
    checks.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8, 16], metavar="W")
    checks.add_argument(
        "--rates", type=checked_rate, nargs="+", default=["10mbit", "100mbit"], help="as for tc"
    )
    checks.add_argument("--rounds", type=int, default=7, help="measured steps of each candidate")
    checks.add_argument("--timeout", type=float, default=900, help="seconds for each launch")
    tables = kinds.add_parser("tables", help="compute the tables of the documentation")
    for each in (checks, tables):
        each.add_argument("--output", type=Path, metavar="FILE", help="write the results there")
    arguments = parser.parse_args(command_line)
    if arguments.what == "check":
        check(arguments)
    elif arguments.output is None:
        print(page(), end="")
    else:
        arguments.output.write_text(page())


if __name__ == "__main__":
    main()
