"""What it costs to change ranks while training: observing steps, deciding, and the change itself.

    python -m benchmarks.rank --workload resnet18

One worker, where nothing is sent, and two that are processes of this machine, over gloo; one thread
each. A pass adds all gradients to as many buffers. All runners step in the same rounds, in another
order each time, and ratios are taken within a round. Allocation is what L-GreCo does once the
errors of all ranks are known, for a made table of 200 layers with 16 ranks each.
"""

import argparse
import functools
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.rank_changes import (
    HIGH,
    LOW,
    Changes,
    Decisions,
    Watched,
    adding_all,
    optimizer_of,
)
from benchmarks.results import describe_machine, in_milliseconds, in_times, show, write_results
from benchmarks.tables import made_table
from benchmarks.timing import Quartiles, Runner, clock_for, differences, measure, ratios
from benchmarks.worker import slowest
from benchmarks.workloads import made_gradients, shapes_of
from efsgd.rank.allocation import allocate_within

PASS, DECISION = "a pass", "a decision of Accordion"
GRADIENTS, BOTH = "gradients", "gradients and errors"
#: Ranks before and after a step, by turns over the layers.
CHANGES = {
    f"all layers {HIGH} to {LOW}": ((HIGH,), (LOW,)),
    f"all layers {LOW} to {HIGH}": ((LOW,), (HIGH,)),
    f"half of the layers {HIGH} to {LOW}": ((HIGH,), (HIGH, LOW)),
    f"half of the layers {LOW} to {HIGH}": ((HIGH, LOW), (HIGH,)),
}
LAYERS, CANDIDATES = 200, 16
WARM_UP = 3
PATIENCE = timedelta(minutes=10)


def ordinary(ranks: Sequence[int]) -> str:
    """The name of a step without a change."""
    return f"a step, rank {' and '.join(map(str, ranks))}"


def runners_of(gradients: Sequence[torch.Tensor]) -> tuple[dict[str, Runner], Decisions]:
    """All that is measured, by name; and what knows how much a decision sends.

    Args:
        gradients: by parameter.
    """
    optimizer, decisions = optimizer_of(gradients), Decisions(optimizer_of(gradients))
    changes = Changes(optimizer)
    runners = {PASS: adding_all(gradients), DECISION: decisions.runner()}
    for name, (before, after) in CHANGES.items():
        runners[name] = changes.runner(before, after)
        runners[ordinary(after)] = changes.runner(after, after)
    watched = Watched(optimizer)
    for name, with_errors in ((GRADIENTS, False), (BOTH, True)):
        own = watched.runner(with_errors=with_errors)
        settle = runners[ordinary((HIGH,))].prepare
        runners[_observed(name)] = Runner(own.step, settle)
        runners[_added(name)] = watched.adding(with_errors=with_errors)
    return runners, decisions


def _observed(name: str) -> str:
    return f"a step that shows {name}"


def _added(name: str) -> str:
    return f"adding {name}"


def work(worker: int, world_size: int, workload: str, rounds: int, folder: str) -> None:
    """What one worker process does; worker 0 writes what was found.

    Args:
        worker: its number.
        world_size: the number of workers.
        workload: a key of `WORKLOADS`.
        rounds: how many are measured.
        folder: where the workers meet.
    """
    torch.set_num_threads(1)
    meeting = Path(folder, "meeting").as_uri()
    dist.init_process_group(
        "gloo", init_method=meeting, rank=worker, world_size=world_size, timeout=PATIENCE
    )
    runners, decisions = runners_of(made_gradients(shapes_of(workload), worker))
    clock = clock_for(torch.device("cpu"))
    samples = measure(runners, rounds, warm_up=WARM_UP, clock=clock, barrier=dist.barrier)
    found = {
        "workers": world_size,
        "decision_bytes": decisions.bytes_each,
        "samples": slowest(samples),
    }
    if worker == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def measured(workload: str, rounds: int, world_size: int) -> dict[str, Any]:
    """Starts the workers and waits for what they find."""
    with tempfile.TemporaryDirectory() as folder:
        given = world_size, workload, rounds, folder
        torch.multiprocessing.spawn(work, args=given, nprocs=world_size)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    return found


def measure_allocation(
    rounds: int, layers: int = LAYERS, candidates: int = CANDIDATES
) -> Quartiles:
    """Seconds to allocate as well as a middle rank everywhere does, each time for another table.

    Args:
        rounds: how many.
        layers: of each table.
        candidates: ranks of each layer.
    """
    clock, seconds = clock_for(torch.device("cpu")), []
    for seed in range(rounds):
        table = made_table(layers, candidates, seed)
        reference = [candidates // 4] * layers
        seconds.append(clock(functools.partial(allocate_within, table, reference)))
    return Quartiles.of(seconds)


def report(workload: str, found: Mapping[str, Any]) -> None:
    """Shows the tables of one number of workers.

    Args:
        workload: what was stepped.
        found: the number of `workers`, `decision_bytes`, and `samples`: seconds by name.
    """
    samples, workers = found["samples"], found["workers"]
    floats = sum(map(math.prod, shapes_of(workload)))
    title = f"{workload}, {floats:,} parameters, workers: {workers}; median (quartiles)"
    step, passes = samples[ordinary((HIGH,))], samples[PASS]
    rows = []
    for name in (*map(ordinary, dict.fromkeys(after for _, after in CHANGES.values())), PASS):
        rows.append([name, in_milliseconds(Quartiles.of(samples[name]))])
    share = in_times(Quartiles.of(ratios(samples[DECISION], step)))
    sent = f"{DECISION}, {found['decision_bytes']:,.0f} bytes"
    rows.append([sent, f"{in_milliseconds(Quartiles.of(samples[DECISION]))}, {share} a step"])
    show(title, ["", "ms"], rows)
    rows = []
    for name in (GRADIENTS, BOTH):
        more = differences(samples[_observed(name)], step)
        alone = samples[_added(name)]
        shares = ratios(samples[_observed(name)], step), ratios(more, passes), ratios(alone, passes)
        rows.append([name, *(in_times(Quartiles.of(share)) for share in shares)])
    columns = ["what is shown", "a step", "the difference in passes", "adding, in passes"]
    show("observed steps, beside ordinary ones", columns, rows)
    rows = []
    for name, (_, after) in CHANGES.items():
        plain = samples[ordinary(after)]
        more = differences(samples[name], plain)
        shares = Quartiles.of(ratios(more, plain))
        rows.append([name, in_milliseconds(Quartiles.of(more)), in_times(shares)])
    show("a change, less an ordinary step", ["", "ms", "in ordinary steps"], rows)


def main(command_line: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rank", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--workload", choices=["resnet18", "lstm"], default="resnet18")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="W")
    parser.add_argument("--rounds", type=int, default=31, help="measured steps of each kind")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the samples there")
    arguments = parser.parse_args(command_line)
    launches = []
    for workers in arguments.workers:
        launches.append(measured(arguments.workload, arguments.rounds, workers))
        report(arguments.workload, launches[-1])
    seconds = in_milliseconds(measure_allocation(arguments.rounds))
    show("allocation", ["", "ms"], [[f"{LAYERS} layers, {CANDIDATES} ranks each", seconds]])
    settings = {"workload": arguments.workload, "rounds": arguments.rounds}
    write_results(arguments.output, "rank", describe_machine(1), settings, {"launches": launches})


if __name__ == "__main__":
    main()
