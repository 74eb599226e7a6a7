"""Trains in pipeline stages whose links are compressed, with one process for each stage.

    python examples/pipeline.py

The table has the form of arXiv 2401.07788: for each method the quality with compression on and off
as the model is evaluated, and the bytes that an epoch sends forwards and backwards, counted from
the buffers that were sent. "A / B" means A for activations and B for gradients. Learning rates are
the same for all methods. Started by torchrun, it has as many stages as processes, 2 or 4. Results
(JSON) and a plot are saved.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe

from efsgd import SymmetricQuantized, TopK, UniformQuantized
from efsgd.pipeline import CompressedStage, Link
from examples.distributed import start_workers
from examples.pipeline_tasks import StagedTask, digits_in_stages, topics_in_stages, whole_batches
from examples.reporting import look, markdown, save_figure, save_json

PLAIN = "No compression"
TASKS: dict[str, Callable[[int], tuple[StagedTask, list[nn.Sequential]]]] = {
    "digits": digits_in_stages,
    "topics": topics_in_stages,
}


def bits(number: int) -> UniformQuantized:
    """Between minimum and maximum."""
    return UniformQuantized(bits=number)


def top(percent: int) -> TopK:
    """Of each sample."""
    return TopK(density=percent / 100)


METHODS: dict[str, tuple[Link, Link]] = {
    PLAIN: (Link(), Link()),
    "8 bits / 8 bits": (Link(bits(8)), Link(SymmetricQuantized(8))),
    "4 bits / 8 bits": (Link(bits(4)), Link(SymmetricQuantized(8))),
    "4 bits / 4 bits": (Link(bits(4)), Link(SymmetricQuantized(4))),
    "4 bits / 4 bits, min-max": (Link(bits(4)), Link(bits(4))),
    "2 bits / 8 bits": (Link(bits(2)), Link(SymmetricQuantized(8))),
    "AQ-SGD, 2 bits / 8 bits": (Link(bits(2), memory="samples"), Link(SymmetricQuantized(8))),
    "Top 30 % / Top 30 %": (Link(top(30)), Link(top(30))),
    "Top 10 % / Top 10 %": (Link(top(10)), Link(top(10))),
    "Top 10 % / none": (Link(top(10)), Link()),
    "none / Top 10 %": (Link(), Link(top(10))),
    "Top 10 % / same positions": (Link(top(10)), Link(top(10), reuse_mask=True)),
    "Top 10 % / Top 10 %, EF": (Link(top(10)), Link(top(10), memory="error")),
    "Top 10 %, EF / Top 10 %, EF": (Link(top(10), memory="error"), Link(top(10), memory="error")),
    "Top 10 %, EF21 / Top 10 %": (Link(top(10), memory="difference"), Link(top(10))),
}
FEW = [PLAIN, "4 bits / 8 bits", "4 bits / 4 bits, min-max", "Top 10 % / Top 10 %"]


def evaluated(schedule: Any, task: StagedTask, stages: int) -> float:
    """The quality on the test part, which the last stage finds; elsewhere it is NaN."""
    inputs, targets = task.test
    count, outputs = len(inputs), []
    for batch in whole_batches(count, task.batch_size, torch.arange(count)):
        outputs.append(_run(schedule.eval, stages, inputs[batch], targets[batch]))
    if dist.get_rank() != stages - 1:
        return float("nan")
    return task.score(torch.cat(outputs)[:count], targets)


def train(
    name: str, method: str, seed: int, stages: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One training: qualities, as the last stage found them, and this stage's bytes in an epoch."""
    torch.manual_seed(seed)
    task, modules = TASKS[name](stages)
    rank, activations_and_gradients = dist.get_rank(), METHODS[method]
    activations, gradients = activations_and_gradients
    module, device = modules[rank], torch.device("cpu")
    links = {"activations": activations, "gradients": gradients}
    stage = CompressedStage(module, rank, stages, device, **links)
    schedule = Schedule1F1B(stage, task.microbatches, loss_fn=task.loss)
    optimizer = torch.optim.SGD(module.parameters(), lr=task.lr, momentum=0.9)
    inputs, targets = (part[: arguments.samples] for part in task.train)
    generator = torch.Generator().manual_seed(seed)
    rounds = task.epochs if arguments.epochs is None else arguments.epochs
    started = time.monotonic()
    for _ in range(rounds):
        order = torch.randperm(len(inputs), generator=generator)
        for batch in whole_batches(len(inputs), task.batch_size, order):
            stage.announce(batch, task.microbatches)
            optimizer.zero_grad()
            _run(schedule.step, stages, inputs[batch], targets[batch])
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    seconds, stats = time.monotonic() - started, stage.communication_stats()
    plain_stage = CompressedStage(module, rank, stages, device)
    plain = ScheduleGPipe(plain_stage, task.microbatches, loss_fn=task.loss)
    with torch.no_grad():
        on, off = evaluated(schedule, task, stages), evaluated(plain, task, stages)
    return {
        "on": on,
        "off": off,
        "forwards": stats["forward_bytes_sent"] / rounds,
        "backwards": stats["backward_bytes_sent"] / rounds,
        "seconds": seconds,
    }


def _run(step: Callable[..., Any], stages: int, inputs: Tensor, targets: Tensor) -> Any:
    """A step or an evaluation: the first stage has the inputs, the last one the targets."""
    given = (inputs,) if dist.get_rank() == 0 else ()
    return step(*given, target=targets) if dist.get_rank() == stages - 1 else step(*given)


def work(rank: int, arguments: argparse.Namespace, stages: int, meeting: str) -> None:
    """All trainings of one stage. The last one writes what came of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=stages)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in arguments.tasks}
    for name, of_task in runs.items():
        for seed in range(1, arguments.seeds + 1):
            for method in arguments.methods:
                own = train(name, method, seed, stages, arguments)
                everyone: list[Any] = [None] * stages
                dist.all_gather_object(everyone, own)
                sums = {
                    key: sum(each[key] for each in everyone) for key in ("forwards", "backwards")
                }
                of_task.setdefault(method, []).append(everyone[-1] | sums)
        if rank == stages - 1:
            show(name, of_task, stages, arguments)
    if rank == stages - 1:
        path = arguments.output / f"pipeline-{stages}"
        save_json(path.with_suffix(".json"), runs)
        plot(path.with_suffix(".png"), runs, stages)
        print(f"saved {path}.json and {path}.png", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def show(
    name: str, of_task: Mapping[str, list[dict[str, Any]]], stages: int, arguments: Any
) -> None:
    """Prints the table of a task."""
    task, _ = TASKS[name](stages)
    table = Table(title=f"{task.title}, {stages} stages", title_justify="left")
    columns = ("Method", f"{task.quality}, on", "off", "MB forwards", "MB backwards")
    for column in columns:
        table.add_column(column, justify="left" if column == "Method" else "right")
    for method, runs in of_task.items():
        sent = (runs[0][key] / 2**20 for key in ("forwards", "backwards"))
        qualities = (cell([run[key] for run in runs]) for key in ("on", "off"))
        table.add_row(method, *qualities, *(f"{each:.2f}" for each in sent))
    if arguments.markdown:
        print(markdown(table), flush=True)
    else:
        Console(width=None if Console().is_terminal else 110).print(table, end="\n\n")


def plot(path: Path, runs: Mapping[str, Mapping[str, list[dict[str, Any]]]], stages: int) -> None:
    """Quality with compression on against the bytes of an epoch, a panel for each task."""
    figure = Figure(figsize=(11, 4.5))
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for panel, (name, of_task) in zip(panels, runs.items(), strict=True):
        task, _ = TASKS[name](stages)
        for number, (method, own) in enumerate(of_task.items()):
            sent = (own[0]["forwards"] + own[0]["backwards"]) / 2**20
            values = [run["on"] for run in own]
            style = look(number) | {"linestyle": ""}
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            panel.errorbar(sent, statistics.mean(values), spread, label=method, **style)
        panel.set(title=task.title, xscale="log", xlabel="MB sent per epoch", ylabel=task.quality)
    panels[-1].legend(bbox_to_anchor=(1.02, 1), loc="upper left", fontsize=8)
    save_figure(path, figure)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=int, nargs="+", choices=(2, 4), default=[2, 4])
    parser.add_argument("--seeds", type=int, default=1, help="trainings each (default: 1)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--epochs", type=int, help="fewer epochs than the tasks have")
    parser.add_argument("--samples", type=int, help="train on the first ones only")
    parser.add_argument("--all", action="store_true", help="all methods, not only a few")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument("--output", type=Path, default=Path("results"), help="for results")
    arguments = parser.parse_args()
    arguments.methods = list(METHODS) if arguments.all else FEW
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        work(int(os.environ["RANK"]), arguments, int(os.environ["WORLD_SIZE"]), "env://")
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for stages in arguments.stages:
        with tempfile.TemporaryDirectory() as folder:
            given = (arguments, stages, f"file://{folder}/meeting-point")
            start_workers(work, given, stages)


if __name__ == "__main__":
    main()
