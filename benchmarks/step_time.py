"""What exchange and update cost per step: PowerSGDOptimizer beside SGD under DDP.

    torchrun --standalone --nproc-per-node 2 benchmarks/step_time.py --workload resnet18 --rank 2

Each worker's gradients are made by one cheap product per parameter, so that nearly all the time of
a step is exchange and update; the time of forward and backward alone is measured, too, and
subtracted. All candidates are measured in one run, in an order that is shuffled anew in each round,
and the figures are medians over the rounds.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from efsgd import PowerSGDOptimizer
from examples.models import CifarResNet18, LSTMLanguageModel

Step = Callable[[], None]


class Shapes(nn.Module):
    """Parameters of given shapes, and a loss with constant gradients that differ by worker."""

    def __init__(self, shapes: list[torch.Size], worker: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(worker)
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
        self.targets = [torch.randn(shape, generator=generator) for shape in shapes]

    def forward(self) -> Tensor:
        pairs = zip(self.weights, self.targets, strict=True)
        return torch.stack([torch.dot(w.flatten(), t.flatten()) for w, t in pairs]).sum()


def shapes_of(workload: str) -> list[torch.Size]:
    """Shapes of all parameters of one of the paper's models."""
    with torch.device("meta"):
        models = {
            "resnet18": CifarResNet18(),
            "lstm": LSTMLanguageModel(28_869, 650, 650, 3),
        }
    return [parameter.shape for parameter in models[workload].parameters()]


def candidates(workload: str, rank: int, worker: int) -> dict[str, Step]:
    """One step of each candidate, gradients included."""
    made: dict[str, Step] = {}

    def add(name: str, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        def step() -> None:
            module.zero_grad(set_to_none=False)
            module().backward()
            if optimizer is not None:
                optimizer.step()

        made[name] = step

    def fresh() -> Shapes:
        return Shapes(shapes_of(workload), worker)

    options = {"lr": 0.01, "momentum": 0.9, "nesterov": True}
    add("backward alone", fresh(), None)
    local = fresh()
    add("SGD without exchange", local, torch.optim.SGD(local.parameters(), **options))
    ddp = DistributedDataParallel(fresh())
    add("DDP + SGD", ddp, torch.optim.SGD(ddp.parameters(), **options))
    for form in ("sgd", "paper"):
        own = fresh()
        given = {**options, "nesterov": form == "sgd"}
        optimizer = PowerSGDOptimizer(own.parameters(), **given, rank=rank, momentum_form=form)
        add(f"efsgd, rank {rank}, form {form}", own, optimizer)
    return made


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each candidate's step, once per round, after two warm-up rounds."""
    order, times = list(steps), {name: [] for name in steps}
    shuffler = random.Random(0)  # the same order on every worker
    for number in range(rounds + 2):
        shuffler.shuffle(order)
        for name in order:
            dist.barrier()
            began = time.perf_counter()
            steps[name]()
            if number >= 2:
                times[name].append(1e3 * (time.perf_counter() - began))
    return times


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=["resnet18", "lstm"], default="resnet18")
    parser.add_argument("--rank", type=int, default=2, help="rank of the compression")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each candidate")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steps = candidates(arguments.workload, arguments.rank, dist.get_rank())
    times = measure(steps, arguments.rounds)
    if dist.get_rank() == 0:
        floor = statistics.median(times["backward alone"])
        print(f"{arguments.workload}, {dist.get_world_size()} workers, medians of", end=" ")
        print(f"{arguments.rounds}; ms of a whole step (range), and less backward alone")
        for name, values in times.items():
            median, low, high = statistics.median(values), min(values), max(values)
            print(f"{name:32} {median:8.1f} ({low:.1f} to {high:.1f}) {median - floor:8.1f}")
        if arguments.output:
            arguments.output.write_text(json.dumps({"arguments": sys.argv[1:], "ms": times}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
