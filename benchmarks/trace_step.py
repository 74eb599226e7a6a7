"""Which Python functions a step goes through, and how long small steps take beside a peer's.

    python -m benchmarks.trace_step --list --epfml ../powersgd

A step on small layers costs what its Python costs. Counted are the calls within one package (a
resumed generator is a call), in a steady step of one worker; those within torch are not.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.candidates import SGD_SETTINGS, use_epfml
from benchmarks.timing import Runner, orders, ratios
from efsgd import PowerSGDOptimizer

__all__: list[str] = []

RANK, WARM_UP = 4, 20
Function = tuple[str, str]  # its file and its name


def arguments_of(command_line: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trace_step", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--list", action="store_true", help="print the functions, by their calls")
    parser.add_argument("--epfml", type=Path, metavar="DIR", help="a clone of epfml/powersgd")
    parser.add_argument("--rounds", type=int, default=500, help="measured steps of each package")
    return parser.parse_args(command_line)


def calls_within(package: Path, step: Callable[[], object]) -> Counter[Function]:
    """How often each function that is defined in `package` is called while `step` runs."""
    inside = f"{package}/"
    found: Counter[Function] = Counter()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(inside):
            found[code.co_filename.removeprefix(inside), code.co_qualname] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(before)
    return found


def traced(package: Path, runner: Runner) -> Counter[Function]:
    """Calls of a steady step."""
    for _ in range(WARM_UP):
        runner.prepare()
        runner.step()
    runner.prepare()
    return calls_within(package, runner.step)


def summary(calls: Counter[Function]) -> str:
    """The counts in words, for example "4 files, 19 functions, 52 Python calls"."""
    files = {file for file, _ in calls}
    return f"{len(files)} files, {len(calls)} functions, {calls.total()} Python calls"


def timed(runners: Mapping[str, Runner], rounds: int) -> dict[str, list[float]]:
    """Seconds of each runner's steps, one in each round, in an order that changes.

    They are the thread's own: what else the machine does while a step waits is not in them.
    """
    samples: dict[str, list[float]] = {name: [] for name in runners}
    for order in orders(runners, WARM_UP + rounds):
        for name in order:
            runners[name].prepare()
            began = time.thread_time()
            runners[name].step()
            samples[name].append(time.thread_time() - began)
    return {name: seconds[WARM_UP:] for name, seconds in samples.items()}


def efsgd_runner(model: nn.Module) -> Runner:
    """A step of this package, with gradients that stay the same."""
    gradients_of(model)
    return Runner(PowerSGDOptimizer(model.parameters(), lr=1e-3, momentum=0.9, rank=RANK).step)


def epfml_runner(model: nn.Module) -> Runner:
    """A step of epfml's package, which keeps its errors where the gradients are added to them."""
    powersgd: Any = importlib.import_module("powersgd")
    gradients = gradients_of(model)
    parameters = list(model.parameters())
    config = powersgd.Config(
        rank=RANK,
        min_compression_rate=1,
        num_iters_per_step=2,  # both factors in each step, as in the paper
        start_compressing_after_num_steps=0,
    )
    aggregator = powersgd.PowerSGD(parameters, config=config)
    optimizer = torch.optim.SGD(parameters, **SGD_SETTINGS, foreach=True)

    def add_gradients() -> None:
        torch._foreach_add_([parameter.grad for parameter in parameters], gradients)

    return Runner(lambda: powersgd.optimizer_step(optimizer, aggregator), add_gradients)


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Gives each parameter a gradient, and returns copies of them."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return [parameter.grad.clone() for parameter in model.parameters()]


def four_tensors() -> nn.Module:
    """The model of which a step is counted: two matrices and two biases."""
    return nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 10))


def eight_layers() -> nn.Module:
    """The model of which steps are timed."""
    return nn.Sequential(*[nn.Linear(32, 32) for _ in range(8)])


def main(command_line: Sequence[str] | None = None) -> int:
    """Entry point."""
    arguments = arguments_of(command_line)
    torch.set_num_threads(1)
    try:
        use_epfml(arguments.epfml)
    except FileNotFoundError as missing:
        print(missing, file=sys.stderr)
        return 2
    makers = {"efsgd": efsgd_runner}
    if arguments.epfml is not None:
        makers["epfml"] = epfml_runner
    for name, make in makers.items():
        package = importlib.import_module("powersgd" if name == "epfml" else "efsgd")
        calls = traced(Path(package.__path__[0]), make(four_tensors()))
        print(f"{name}: {summary(calls)}")
        if arguments.list:
            for (file, function), count in calls.most_common():
                print(f"{count:5}  {file}: {function}")
    if arguments.epfml is not None:
        samples = timed({n: make(eight_layers()) for n, make in makers.items()}, arguments.rounds)
        for name, seconds in samples.items():
            print(f"{name}: {1e6 * statistics.median(seconds):.0f} µs a step of eight layers")
        ratio = statistics.median(ratios(samples["efsgd"], samples["epfml"]))
        print(f"efsgd takes {ratio:.2f} times as long as epfml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
