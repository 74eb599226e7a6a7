"""How a step grows: with the number of workers, and with the rank.

    python -m benchmarks.growth workers --rate 1gbit
    python -m benchmarks.growth ranks --workload resnet18

`workers` times the two all-reduces of a step, and nothing else, on 2 to 16 workers in network
namespaces (Linux, root), beside what the α–β model predicts from a small and a large all-reduce.
`ranks` times the step of one worker, and orthogonalization by itself.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.candidates import Bench, Candidate
from benchmarks.namespaces import (
    MissingPrerequisite,
    Network,
    WorkerFailure,
    check_prerequisites,
    checked_rate,
)
from benchmarks.results import describe_machine, in_milliseconds, show, write_results
from benchmarks.timing import Quartiles, clock_for, differences, measure
from benchmarks.workloads import WORKLOADS, made_gradients, message_floats, shapes_of
from efsgd.planning import Link

# Two each, one after the other, as in a step.
SMALL, LARGE = (Candidate("all-reduce", nbytes=(n, n)) for n in (1024, 4_000_000))
FLOOR = Candidate("floor")
WARM_UP = 3


@dataclass(frozen=True)
class Prediction:
    """The two all-reduces of a step, beside what the α–β model says.

    Attributes:
        title: workload and rank.
        workers: how many.
        nbytes: of the two buffers.
        seconds: measured.
        predicted: seconds.
    """

    title: str
    workers: int
    nbytes: tuple[int, ...]
    seconds: Quartiles
    predicted: float

    @property
    def deviation(self) -> float:
        """Of the prediction from the median, as a part of the median."""
        return self.predicted / self.seconds.median - 1


def arguments_of(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=__doc__.split("\n")[0]
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--rounds", type=int, default=15, help="measured steps of each candidate")
    shared.add_argument("--output", type=Path, metavar="FILE", help="write the samples there")
    kinds = parser.add_subparsers(dest="what", required=True)
    workers = kinds.add_parser("workers", parents=[shared], help="with the number of workers")
    workers.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8, 16], metavar="W")
    workers.add_argument("--rate", type=checked_rate, default="1gbit", help="as for tc")
    workers.add_argument("--workloads", choices=WORKLOADS, nargs="+", default=["resnet18", "lstm"])
    workers.add_argument("--ranks", type=int, nargs="+", default=[4], metavar="R")
    workers.add_argument("--timeout", type=float, default=900, help="seconds for each launch")
    ranks = kinds.add_parser("ranks", parents=[shared], help="with the rank")
    ranks.add_argument("--workload", choices=WORKLOADS, default="resnet18")
    ranks.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], metavar="R")
    ranks.add_argument("--form", choices=["sgd", "paper"], default="sgd", help="of the momentum")
    ranks.add_argument("--compiled", action="store_true", help="with compile=True")
    return parser.parse_args(command_line)


def messages_of(workload: str, rank: int) -> Candidate:
    """The two all-reduces of a step, control words left aside."""
    first, second = message_floats(shapes_of(workload), rank)
    return Candidate("all-reduce", nbytes=(4 * first, 4 * second))


def predictions(launch: Mapping[str, Any]) -> Iterator[Prediction]:
    """What a launch measured, beside the α–β model of the same launch.

    Args:
        launch: `workers`, `messages` (sizes by title) and `samples` (seconds by name of the
            candidate), in the file that `growth workers` writes.
    """
    link = link_of(launch)
    for title, sizes in launch["messages"].items():
        nbytes = tuple(sizes)
        seconds = Quartiles.of(launch["samples"][Candidate("all-reduce", nbytes=nbytes).name])
        predicted = sum(map(link.seconds, nbytes))
        yield Prediction(title, link.workers, nbytes, seconds, predicted)


def link_of(launch: Mapping[str, Any]) -> Link:
    """The link as a launch of `growth workers` measured it."""
    # Two messages of a size took twice what one of them takes.
    small, large = (
        (candidate.nbytes[0], Quartiles.of(launch["samples"][candidate.name]).median / 2)
        for candidate in (SMALL, LARGE)
    )
    return Link.measured(launch["workers"], small, large)


def with_workers(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Samples for each number of workers."""
    listed = {
        f"{WORKLOADS[workload]}, rank {rank}": messages_of(workload, rank)
        for workload in arguments.workloads
        for rank in arguments.ranks
    }
    found = []
    for workers in arguments.workers:
        with Network(workers, arguments.rate) as network:
            job = {
                "workload": None,
                "candidates": [asdict(candidate) for candidate in (SMALL, LARGE, *listed.values())],
                "rounds": arguments.rounds,
                "warm_up": WARM_UP,
                "epfml": None,
            }
            launch = network.run(job, arguments.timeout)
        sizes = {title: candidate.nbytes for title, candidate in listed.items()}
        found.append({"workers": workers, "messages": sizes, "samples": launch["samples"]})
        rows = [
            (
                p.title,
                " + ".join(map(str, p.nbytes)),
                in_milliseconds(p.seconds),
                f"{1e3 * p.predicted:.4g}",
                f"{100 * p.deviation:+.0f} %",
            )
            for p in predictions(found[-1])
        ]
        columns = ("", "bytes", "measured, ms", "predicted, ms", "deviation")
        show(f"{workers} workers, {arguments.rate}", columns, rows)
    return found


def with_ranks(arguments: argparse.Namespace) -> dict[str, Any]:
    """Samples for each rank: of the step, and of orthogonalization by itself."""
    bench = Bench(made_gradients(shapes_of(arguments.workload)))
    listed = {}
    for rank in arguments.ranks:
        listed[rank] = (
            Candidate("efsgd", rank, arguments.form, arguments.compiled),
            Candidate("orthogonalization", rank),
        )
    runners = {c.name: bench.runner(c) for c in (FLOOR, *sum(listed.values(), ()))}
    bar = iter(track(range(WARM_UP + arguments.rounds), "rounds", transient=True))
    samples = measure(
        runners,
        arguments.rounds,
        warm_up=WARM_UP,
        clock=clock_for(torch.device("cpu")),
        after_round=lambda: next(bar, None),
    )
    rows, found = [], []
    for rank, (whole, part) in listed.items():
        net = differences(samples[whole.name], samples[FLOOR.name])
        sent = bench.optimizers[whole.name].communication_stats()["bytes_sent"]
        alone = samples[part.name]
        messages = messages_of(arguments.workload, rank).nbytes
        times = {"step": net, "orthogonalization": alone}
        found.append({"rank": rank, "bytes_sent": sent, "messages": messages, **times})
        shown = [in_milliseconds(Quartiles.of(seconds)) for seconds in times.values()]
        rows.append((str(rank), str(sent), *shown))
    columns = ("rank", "bytes sent", "step of one worker, ms", "orthogonalization, ms")
    show(WORKLOADS[arguments.workload], columns, rows)
    return {"ranks": found}


def main() -> int:
    """Entry point."""
    arguments = arguments_of()
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    try:
        if arguments.what == "workers":
            check_prerequisites()
            found = {"launches": with_workers(arguments)}
        else:
            found = with_ranks(arguments)
    except MissingPrerequisite as missing:
        print(missing, file=sys.stderr)
        return 2
    except WorkerFailure as failure:
        print(failure, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    write_results(arguments.output, "growth", describe_machine(threads=1), settings, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
