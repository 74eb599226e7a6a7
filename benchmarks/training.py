"""Whole trainings of four workers on a slow network: how good a model is after how many seconds.

    python -m benchmarks.training --task lstm --rate 100mbit --epfml DIR

Each worker is a process in a network namespace of its own, so this needs Linux, root and iproute2;
they share the machine's cores. All methods have the same hyper-parameters and take as many steps.
Seconds are those of steps and decisions, without tests. With --output every training is saved as
soon as it is over, and --resume goes on from there.
"""

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.namespaces import checked_rate, measured
from benchmarks.results import describe_machine, show, write_results
from benchmarks.time_to_quality import Run, plot, shared_quality, table
from benchmarks.training_worker import METHODS, PLAIN, TASKS


def key_of(method: str, seed: int) -> str:
    """Of a training, in the file of results."""
    return f"{method} | {seed}"


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line, or these words of one."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--task", choices=list(TASKS), default="lstm")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: all")
    parser.add_argument("--workers", type=int, default=4, help="how many (default: 4)")
    parser.add_argument("--rate", type=checked_rate, default="100mbit", help="as for tc")
    parser.add_argument("--seeds", type=int, default=3, help="trainings each (default: 3)")
    parser.add_argument("--epochs", type=int, help="fewer than the task's settings say")
    parser.add_argument("--lr", type=float, help="learning rate of one worker, for trying out")
    parser.add_argument("--epfml", metavar="DIR", help="a clone of github.com/epfml/powersgd")
    parser.add_argument("--cifar10", metavar="DIR", help="CIFAR-10's binary files")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of one training")
    parser.add_argument("--resume", action="store_true", help="go on from what --output has")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the runs there")
    arguments = parser.parse_args(words)
    if arguments.task == "cifar10" and arguments.cifar10 is None:
        parser.error("--task cifar10 reads CIFAR-10's binary files: say where, with --cifar10 DIR")
    if arguments.methods is None:
        has_epfml = arguments.epfml is not None
        arguments.methods = [m for m in METHODS if has_epfml or not m.startswith("epfml")]
    elif arguments.epfml is None and any(m.startswith("epfml") for m in arguments.methods):
        parser.error("epfml's package on PyPI is empty: give a clone, with --epfml DIR")
    return arguments


def trained(arguments: argparse.Namespace) -> dict[str, Run]:
    """All trainings, those of a seed in random order."""
    path: Path | None = arguments.output
    found: dict[str, Run] = {}
    if arguments.resume and path is not None and path.exists():
        found = json.loads(path.read_text())["runs"]
    for seed in range(1, arguments.seeds + 1):
        methods = list(arguments.methods)
        random.shuffle(methods)
        for method in methods:
            if key_of(method, seed) in found:
                continue
            job = {"module": "benchmarks.training_worker", "method": method, "seed": seed}
            given = ("task", "epochs", "lr", "cifar10", "epfml")
            job |= {name: getattr(arguments, name) for name in given}
            run = measured(arguments.workers, arguments.rate, job, arguments.timeout)
            found[key_of(method, seed)] = run
            print(f"{method}, seed {seed}: {run['is']} {run['quality'][-1]:.2f} after "
                  f"{run['seconds'][-1]:.0f} s", flush=True)  # fmt: skip
            save(arguments, found)
    return found


def save(arguments: argparse.Namespace, found: Mapping[str, Run]) -> None:
    """Writes what was measured so far."""
    names = ("task", "workers", "rate", "seeds", "epochs", "lr")
    settings = {name: getattr(arguments, name) for name in names}
    write_results(
        arguments.output, "training", describe_machine(1), settings, {"runs": dict(found)}
    )


def main(command_line: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = parse_arguments(command_line)
    found = trained(arguments)
    save(arguments, found)
    runs: dict[str, list[Run]] = {
        method: [found[key_of(method, seed)] for seed in range(1, arguments.seeds + 1)]
        for method in arguments.methods
    }
    target = shared_quality(runs)
    title = f"{arguments.task}, {arguments.workers} workers, {arguments.rate}"
    quality = next(iter(runs.values()))[0]["is"]
    columns = (
        "", f"final {quality}", "MB sent", "seconds", f"seconds to {target:.2f}",
        f"faster than {PLAIN}",
    )  # fmt: skip
    show(title, columns, table(runs, target, baseline=PLAIN))
    if arguments.output is not None:
        plot(arguments.output.with_suffix(".png"), title, runs, target)


if __name__ == "__main__":
    main()
