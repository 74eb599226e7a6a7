"""What comparing workers costs: checksums of all they must have in common, beside a step.

    python -m benchmarks.checks --workload resnet18

One worker, where nothing is sent; what a check sends besides is 24 bytes.
"""

import argparse
import math
from collections.abc import Mapping, Sequence

import torch

from benchmarks.candidates import Bench, Candidate
from benchmarks.results import in_milliseconds, in_times, show
from benchmarks.timing import Quartiles, Runner, clock_for, differences, measure, ratios
from benchmarks.workloads import WORKLOADS, made_gradients, shapes_of
from efsgd import PowerSGDOptimizer
from efsgd.engine.consistency import replicated
from efsgd.engine.parameters import list_parameters
from efsgd.wire.compare import checksum

__all__: list[str] = []

FLOOR, STEP = Candidate("floor"), Candidate("efsgd", rank=4, form="sgd")
CHECK = "check"
WARM_UP = 2


def check(optimizer: PowerSGDOptimizer) -> int:
    """What a worker computes for `efsgd.wire.compare.compare`; returns the number of tensors."""
    infos = list_parameters(optimizer.param_groups)
    values = replicated(infos, optimizer.state, optimizer.compressor).values()
    return len([checksum(value) for value in values])


def report(workload: str, samples: Mapping[str, Sequence[float]]) -> None:
    """Shows the table.

    Args:
        workload: what was stepped.
        samples: seconds by name: of the floor, of steps, and of checks.
    """
    steps = differences(samples[STEP.name], samples[FLOOR.name])
    cost = in_times(Quartiles.of(ratios(samples[CHECK], steps)))
    floats = sum(map(math.prod, shapes_of(workload)))
    show(
        f"{workload}, {floats:,} parameters, rank 4, SGD's momentum; median (quartiles)",
        ["", "ms", "of a step"],
        [
            ["a step", in_milliseconds(Quartiles.of(steps)), ""],
            ["a check", in_milliseconds(Quartiles.of(samples[CHECK])), cost],
        ],
    )


def main(command_line: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--workload", choices=WORKLOADS, default="resnet18")
    parser.add_argument("--rounds", type=int, default=31, help="measured steps and checks")
    arguments = parser.parse_args(command_line)
    torch.set_num_threads(1)
    bench = Bench(made_gradients(shapes_of(arguments.workload)))
    runners = {each.name: bench.runner(each) for each in (FLOOR, STEP)}
    [optimizer] = bench.optimizers.values()
    runners[CHECK] = Runner(lambda: check(optimizer))
    clock = clock_for(bench.device)
    samples = measure(runners, arguments.rounds, warm_up=WARM_UP, clock=clock)
    report(arguments.workload, samples)


if __name__ == "__main__":
    main()
