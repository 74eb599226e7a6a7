"""What each compressor costs a worker, in passes and of SGD's time; top-k beside torch.topk.

    python -m benchmarks.family --workload resnet18

One worker, where nothing is sent. A pass is half of what copying a gradient's memory takes: reading
or writing each number once. All candidates step in the same rounds, in another order each time.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results import describe_machine, in_milliseconds, in_times, show, write_results
from benchmarks.timing import Quartiles, Runner, clock_for, measure, ratios
from benchmarks.workloads import WORKLOADS, made_gradients, shapes_of
from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    Identity,
    PowerSGD,
    RandomBlock,
    RandomK,
    SignNorm,
    Signum,
    SpectralAtomo,
    SymmetricQuantized,
    TopK,
    UniformQuantized,
)
from efsgd.randomness import Draws

COPY, SGD = "copy", "SGD (torch, foreach)"
TORCH_TOP_K, OUR_TOP_K = "torch.topk of |x|", "TopK.compress"
CANDIDATES: dict[str, Any] = {
    "uncompressed": Identity(),
    "PowerSGD, rank 2": PowerSGD(2),
    "PowerSGD in half steps, rank 2": PowerSGD(2, alternating=True),
    "LQ-SGD, rank 2, 8 bits": LQSGD(2),
    "Random Block, rank 2's": RandomBlock(rank=2),
    "Random K, rank 2's": RandomK(rank=2),
    "Top K, rank 2's": TopK(rank=2),
    "Top K of all, 1/100": TopK(density=0.01, scope="model"),
    "Sign+Norm": SignNorm(),
    "8 bits": UniformQuantized(bits=8),
    "8 bits, symmetric": SymmetricQuantized(bits=8),
    "4 bits, stochastic": UniformQuantized(bits=4, stochastic=True),
    "Signum": None,
}
WARM_UP = 2
#: Workloads: those of all benchmarks, and one of small tensors, where operations are what counts.
SMALL = "small"


def _shapes(workload: str) -> list[tuple[int, ...]]:
    return [(16, 16)] * 1000 if workload == SMALL else shapes_of(workload)


def _optimizer(compressor: Any, gradients: Sequence[Tensor]) -> torch.optim.Optimizer:
    parameters = [torch.zeros_like(gradient, requires_grad=True) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    if compressor is None:
        return Signum(parameters, lr=1e-4)
    if compressor is SGD:
        return torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, foreach=True)
    has_feedback = not isinstance(compressor, SpectralAtomo)
    options = {"momentum": 0.9, "error_feedback": has_feedback, "compressor": compressor}
    return ErrorFeedbackSGD(parameters, lr=1e-4, **options)


def _runners(workload: str, candidates: Mapping[str, Any]) -> dict[str, Runner]:
    gradients = made_gradients(_shapes(workload))
    source = torch.cat([gradient.flatten() for gradient in gradients])
    target = torch.empty_like(source)
    runners = {COPY: Runner(lambda: target.copy_(source))}
    for name, compressor in {SGD: SGD, **candidates}.items():
        runners[name] = Runner(_optimizer(compressor, gradients).step)
    return runners


def _top_k_runners(workload: str, density: float) -> dict[str, Runner]:
    values = torch.cat([gradient.flatten() for gradient in made_gradients(_shapes(workload))])
    top_k = TopK(density=density, scope="model")
    draws = Draws(0, 0, 0, 0)
    count = max(1, int(density * len(values)))
    return {
        TORCH_TOP_K: Runner(lambda: values.abs().topk(count, sorted=False)),
        OUR_TOP_K: Runner(lambda: top_k.compress(values, draws)),
    }


def report(workload: str, samples: Mapping[str, Sequence[float]]) -> None:
    """Shows the tables.

    Args:
        workload: what was stepped.
        samples: seconds by name.
    """
    floats = sum(map(math.prod, _shapes(workload)))
    copies = samples[COPY]
    rows = []
    for name, seconds in samples.items():
        if name in (TORCH_TOP_K, OUR_TOP_K):
            continue
        passes = Quartiles.of(ratios(seconds, [copy / 2 for copy in copies]))
        of_sgd = in_times(Quartiles.of(ratios(seconds, samples[SGD])))
        rows.append([name, in_milliseconds(Quartiles.of(seconds)), in_times(passes), of_sgd])
    title = f"{workload}, {floats:,} parameters: a step of one worker; median (quartiles)"
    show(title, ["", "ms", "passes", "of SGD's time"], rows)
    ours, theirs = samples[OUR_TOP_K], samples[TORCH_TOP_K]
    rows = [
        [TORCH_TOP_K, in_milliseconds(Quartiles.of(theirs)), ""],
        [
            OUR_TOP_K,
            in_milliseconds(Quartiles.of(ours)),
            in_times(Quartiles.of(ratios(ours, theirs))),
        ],
    ]
    show(f"the largest hundredth of {floats:,}", ["", "ms", "of torch's time"], rows)


def main(command_line: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.family", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--workload", choices=[*WORKLOADS, SMALL], default="resnet18")
    parser.add_argument("--rounds", type=int, default=11, help="measured steps of each candidate")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the samples there")
    arguments = parser.parse_args(command_line)
    torch.set_num_threads(1)
    clock = clock_for(torch.device("cpu"))
    samples: dict[str, list[float]] = {}
    for runners in (
        _runners(arguments.workload, CANDIDATES),
        _top_k_runners(arguments.workload, 0.01),
    ):
        samples |= measure(runners, arguments.rounds, warm_up=WARM_UP, clock=clock)
    report(arguments.workload, samples)
    settings = {"workload": arguments.workload, "rounds": arguments.rounds}
    machine = describe_machine(1)
    write_results(arguments.output, "family", machine, settings, {"samples": samples})


if __name__ == "__main__":
    main()
