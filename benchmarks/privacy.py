"""What a private step costs beside one of Opacus: clip, noise, and everything after it.

    python -m benchmarks.privacy

One worker, where nothing is sent, with gradients of records that are there already: both sides
clip, sum, add noise and update. Candidates step in the same rounds, in another order each time.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from benchmarks.results import describe_machine, in_milliseconds, in_times, show, write_results
from benchmarks.timing import Quartiles, Runner, clock_for, measure, ratios
from efsgd import ErrorFeedbackSGD, Identity, PowerSGDOptimizer, TopK
from efsgd.privacy import PrivateOptimizer

OPACUS = "Opacus, SGD"
#: A small convolutional network: its gradients of 64 records take 27 MB.
SHAPES = [(32, 3, 3, 3), (32,), (64, 32, 3, 3), (64,), (128, 64, 3, 3), (128,), (10, 1152), (10,)]
SETTINGS = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 64}


def _opacus(parameters: list[Tensor]) -> DPOptimizer:
    sgd = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, foreach=True)
    return DPOptimizer(sgd, **SETTINGS)


CANDIDATES: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    OPACUS: _opacus,
    "uncompressed": lambda p: _private(ErrorFeedbackSGD(p, 1e-4, 0.9, compressor=Identity())),
    "PowerSGD, rank 2": lambda p: _private(PowerSGDOptimizer(p, 1e-4, 0.9, rank=2)),
    "Top K, 1/100": lambda p: _private(
        ErrorFeedbackSGD(p, 1e-4, 0.9, compressor=TopK(density=0.01))
    ),
}


def _private(optimizer: torch.optim.Optimizer) -> PrivateOptimizer:
    return PrivateOptimizer(optimizer, **SETTINGS)


def _runner(make: Callable[[list[Tensor]], torch.optim.Optimizer], records: int) -> Runner:
    parameters = [torch.zeros(shape, requires_grad=True) for shape in SHAPES]
    samples = [torch.randn(records, *shape) for shape in SHAPES]
    optimizer = make(parameters)

    def prepare() -> None:
        optimizer.zero_grad()
        for parameter, own in zip(parameters, samples, strict=True):
            parameter.grad_sample = own.view_as(own)  # a new tensor: Opacus marks what is used up

    return Runner(optimizer.step, prepare)


def main(command_line: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.privacy", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--records", type=int, default=64, help="in a batch")
    parser.add_argument("--rounds", type=int, default=51, help="measured steps of each candidate")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the samples there")
    arguments = parser.parse_args(command_line)
    torch.set_num_threads(1)
    runners = {name: _runner(make, arguments.records) for name, make in CANDIDATES.items()}
    clock = clock_for(torch.device("cpu"))
    samples = measure(runners, arguments.rounds, warm_up=3, clock=clock)
    rows = [
        [
            name,
            in_milliseconds(Quartiles.of(seconds)),
            in_times(Quartiles.of(ratios(seconds, samples[OPACUS]))),
        ]
        for name, seconds in samples.items()
    ]
    floats = sum(map(math.prod, SHAPES))
    title = f"{floats:,} parameters, {arguments.records} records: a private step of one worker"
    show(f"{title}; median (quartiles)", ["", "ms", "of Opacus's"], rows)
    settings = {"records": arguments.records, "rounds": arguments.rounds}
    write_results(arguments.output, "privacy", describe_machine(1), settings, {"samples": samples})


if __name__ == "__main__":
    main()
