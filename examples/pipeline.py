"""Trains in pipeline stages whose links are compressed, with one process for each stage.

    python examples/pipeline.py

The table has the form of arXiv 2401.07788: for each method the quality with compression on and off
as the model is evaluated, and the bytes that an epoch sends forwards and backwards, counted from
the buffers that were sent. "A / B" means A for activations and B for gradients. Learning rates are
the same for all methods. Started by torchrun, it has as many stages as processes, 2 or 4. Results
(JSON) and a plot are saved, and what each training has found as soon as it is over: --resume goes
on from there.

With `--data DIR`: ResNet18 on CIFAR-10 with that paper's settings, read from the files of its
binary version in DIR.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
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
from examples.pipeline_tasks import (
    StagedTask,
    cifar10_in_stages,
    digits_in_stages,
    topics_in_stages,
    whole_batches,
)
from examples.reporting import COLORS, markdown, save_figure, save_json

PLAIN = "No compression"
BUILT_IN = ("digits", "topics")


def bits(number: int) -> UniformQuantized:
    """Between minimum and maximum."""
    return UniformQuantized(bits=number)


def top(percent: int) -> TopK:
    """Of each sample."""
    return TopK(density=percent / 100)


METHODS: dict[str, tuple[Link, Link]] = {
    PLAIN: (Link(), Link()),
    "4 bits / 8 bits": (Link(bits(4)), Link(SymmetricQuantized(8))),
    "4 bits / 4 bits": (Link(bits(4)), Link(SymmetricQuantized(4))),
    "4 bits / 4 bits, min-max": (Link(bits(4)), Link(bits(4))),
    "2 bits / 8 bits": (Link(bits(2)), Link(SymmetricQuantized(8))),
    "8 bits / 2 bits": (Link(bits(8)), Link(SymmetricQuantized(2))),
    "AQ-SGD, 2 bits / 8 bits": (Link(bits(2), memory="samples"), Link(SymmetricQuantized(8))),
    "Top 30 % / Top 30 %": (Link(top(30)), Link(top(30))),
    "Top 10 % / Top 10 %": (Link(top(10)), Link(top(10))),
    "Top 5 % / Top 5 %": (Link(top(5)), Link(top(5))),
    "Top 10 % / none": (Link(top(10)), Link()),
    "none / Top 10 %": (Link(), Link(top(10))),
    "Top 10 % / same positions": (Link(top(10)), Link(top(10), reuse_mask=True)),
    "Top 10 % / Top 10 %, EF": (Link(top(10)), Link(top(10), memory="error")),
    "Top 10 %, EF / Top 10 %, EF": (Link(top(10), memory="error"), Link(top(10), memory="error")),
    "Top 10 %, EF21 / Top 10 %, EF21": (
        Link(top(10), memory="difference"),
        Link(top(10), memory="difference"),
    ),
    "AQ-SGD, Top 30 % / Top 30 %": (Link(top(30), memory="samples"), Link(top(30))),
    "AQ-SGD, Top 10 % / Top 10 %": (Link(top(10), memory="samples"), Link(top(10))),
}
FEW = [PLAIN, "4 bits / 8 bits", "4 bits / 4 bits, min-max", "Top 10 % / Top 10 %"]


def task_of(
    name: str, stages: int, arguments: argparse.Namespace
) -> tuple[StagedTask, list[nn.Sequential]]:
    """A task with what the command line says otherwise, and fresh stages of its model."""
    if name == "cifar10":
        task, modules = cifar10_in_stages(stages, arguments.data)
    else:
        task, modules = (digits_in_stages if name == "digits" else topics_in_stages)(stages)
    given = {key: getattr(arguments, key) for key in ("epochs", "batch_size")}
    return replace(task, **{key: value for key, value in given.items() if value}), modules


def evaluated(schedule: Any, task: StagedTask, stages: int) -> float:
    """The quality on the test part, which the last stage finds; elsewhere it is NaN."""
    inputs, targets = task.test
    count, outputs = len(inputs), []
    for batch in whole_batches(count, task.batch_size, torch.arange(count)):
        prepared = task.prepare(inputs[batch], None)
        outputs.append(_run(schedule.eval, stages, prepared, targets[batch]))
    if dist.get_rank() != stages - 1:
        return float("nan")
    return task.score(torch.cat(outputs)[:count], targets)


def train(
    name: str, method: str, seed: int, stages: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One training: qualities, as the last stage found them, and this stage's bytes in an epoch."""
    torch.manual_seed(seed)
    task, modules = task_of(name, stages, arguments)
    rank, (activations, gradients) = dist.get_rank(), METHODS[method]
    module, device = modules[rank], torch.device("cpu")
    links = {"activations": activations, "gradients": gradients}
    stage = CompressedStage(module, rank, stages, device, **links)
    schedule = Schedule1F1B(stage, task.microbatches, loss_fn=task.loss)
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(
        parameters, lr=task.lr, momentum=0.9, weight_decay=task.weight_decay
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.epochs)
    inputs, targets = (part[: arguments.samples] for part in task.train)
    generator = torch.Generator().manual_seed(seed)
    started = time.monotonic()
    for _ in range(task.epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for batch in whole_batches(len(inputs), task.batch_size, order):
            stage.announce(batch, task.microbatches)
            optimizer.zero_grad()
            prepared = task.prepare(inputs[batch], generator)
            _run(schedule.step, stages, prepared, targets[batch])
            if task.clip is not None:
                nn.utils.clip_grad_norm_(parameters, task.clip)
            optimizer.step()
        if task.is_cosine:
            cosine.step()
    seconds, stats = time.monotonic() - started, stage.communication_stats()
    module.eval()
    plain_stage = CompressedStage(module, rank, stages, device)
    plain = ScheduleGPipe(plain_stage, task.microbatches, loss_fn=task.loss)
    with torch.no_grad():
        on, off = evaluated(schedule, task, stages), evaluated(plain, task, stages)
    return {
        "on": on,
        "off": off,
        "forwards": stats["forward_bytes_sent"] / task.epochs,
        "backwards": stats["backward_bytes_sent"] / task.epochs,
        "seconds": seconds,
    }


def _run(step: Callable[..., Any], stages: int, inputs: Tensor, targets: Tensor) -> Any:
    """A step or an evaluation: the first stage has the inputs, the last one the targets."""
    given = (inputs,) if dist.get_rank() == 0 else ()
    return step(*given, target=targets) if dist.get_rank() == stages - 1 else step(*given)


def found_by_all(
    name: str, method: str, seed: int, stages: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """What a training has found, now or, with --resume, before: the last stage keeps it."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{name}-{stages}-{seed}-{method}".lower())
    path = arguments.output / "pipeline-trainings" / f"{slug}.json"
    task, _ = task_of(name, stages, arguments)
    own = {"method": method, "epochs": task.epochs, "batch_size": task.batch_size}
    own["samples"] = arguments.samples
    is_last, known = dist.get_rank() == stages - 1, [None]
    if arguments.resume and is_last and path.exists():
        content = json.loads(path.read_text())
        known = [content["found"] if content["settings"] == own else None]
    dist.broadcast_object_list(known, src=stages - 1)
    if known[0] is not None:
        return known[0]
    everyone: list[Any] = [None] * stages
    dist.all_gather_object(everyone, train(name, method, seed, stages, arguments))
    sums = {key: sum(each[key] for each in everyone) for key in ("forwards", "backwards")}
    found = everyone[-1] | sums
    if is_last:
        save_json(path, {"settings": own, "found": found})
    return found


def work(rank: int, arguments: argparse.Namespace, stages: int, meeting: str) -> None:
    """All trainings of one stage. The last one writes what came of them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=stages)
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in arguments.tasks}
    tasks = {name: task_of(name, stages, arguments)[0] for name in runs}
    for name, of_task in runs.items():
        for seed in range(1, arguments.seeds + 1):
            for method in arguments.methods:
                found = found_by_all(name, method, seed, stages, arguments)
                of_task.setdefault(method, []).append(found)
        if rank == stages - 1:
            show(tasks[name], of_task, stages, arguments)
    if rank == stages - 1:
        path = arguments.output / f"pipeline-{stages}"
        save_json(path.with_suffix(".json"), runs)
        plot(path.with_suffix(".png"), [(tasks[name], runs[name]) for name in runs], stages)
        print(f"saved {path}.json and {path}.png", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    if max(values) > 1e4:
        return "diverged"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def show(
    task: StagedTask, of_task: Mapping[str, list[dict[str, Any]]], stages: int, arguments: Any
) -> None:
    """Prints the table of a task."""
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


def plot(
    path: Path, shown: list[tuple[StagedTask, Mapping[str, list[dict[str, Any]]]]], stages: int
) -> None:
    """Quality with compression on (filled) and off (hollow), a panel for each task."""
    count = max(len(of_task) for _, of_task in shown)
    figure = Figure(figsize=(5.5 * len(shown) + 1, 1.5 + 0.28 * count))
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for panel, (task, of_task) in zip(panels, shown, strict=True):
        best = statistics.mean(run["on"] for run in of_task[next(iter(of_task))])
        for key, face, shift in (("on", COLORS[5], -0.15), ("off", "white", 0.15)):
            values = [[run[key] for run in runs] for runs in of_task.values()]
            panel.errorbar(
                [statistics.mean(each) for each in values],
                [place + shift for place in range(len(values))],
                xerr=[statistics.stdev(each) if len(each) > 1 else 0.0 for each in values],
                fmt="o", markersize=5, color=COLORS[5], markerfacecolor=face,
                label=f"evaluated with compression {key}",
            )  # fmt: skip
        panel.axvline(best, color="0.7", linewidth=0.8, zorder=0)
        if "perplexity" in task.quality:
            panel.set_xlim(0.9 * best, min(3 * best, panel.get_xlim()[1]))  # beyond is no learning
        panel.set(xlabel=task.quality, yticks=range(len(of_task)), yticklabels=list(of_task))
        panel.set_title(f"{task.title}, {stages} stages", loc="left", fontsize=9)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False, fontsize=8, loc="best")
    save_figure(path, figure)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages", type=int, nargs="+", choices=(2, 4), help="default: 2 4, with --data 4"
    )
    parser.add_argument("--seeds", type=int, default=1, help="trainings each (default: 1)")
    parser.add_argument("--tasks", nargs="+", choices=BUILT_IN, default=list(BUILT_IN))
    parser.add_argument("--data", type=Path, metavar="DIR", help="CIFAR-10's binary files")
    parser.add_argument("--epochs", type=int, help="in place of the tasks' own")
    parser.add_argument("--batch-size", type=int, help="in place of the tasks' own")
    parser.add_argument("--samples", type=int, help="train on the first ones only")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=FEW)
    parser.add_argument("--all", action="store_true", help="all methods, not only a few")
    parser.add_argument(
        "--resume", action="store_true", help="trainings that were done before are not done again"
    )
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    parser.add_argument("--output", type=Path, default=Path("results"), help="for results")
    arguments = parser.parse_args()
    if arguments.all:
        arguments.methods = list(METHODS)
    if arguments.data is not None:
        arguments.tasks = ["cifar10"]
    if arguments.stages is None:
        arguments.stages = [2, 4] if arguments.data is None else [4]
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
