"""One worker of `benchmarks.planning`: whole steps whose passes sleep, and what they consist of.

`namespaces.Network` starts it. Its only argument is a JSON file::

    rounds        how many steps of each candidate are measured
    warm_up       how many come before
    timeout       seconds, for every wait
    output        where worker 0 writes the samples, by candidate
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.timing import Runner, clock_for, measure
from benchmarks.worker import slowest, work
from benchmarks.workloads import made_gradients
from efsgd import LQSGD, ErrorFeedbackSGD, PowerSGD, SignNorm, TopK
from efsgd.compressors import Compressor
from efsgd.planning.sending import Echo

#: Four matrices of 1 MB, and vectors.
SHAPES = [shape for _ in range(4) for shape in ((512, 512), (512,))]
FORWARD, BACKWARD = 0.01, 0.03
PLAIN, UPDATE = "DDP and SGD", "SGD"
#: Bytes of the two all-reduces from which the link is found.
PROBES = {"small": 1024, "large": 2**20}
CANDIDATES: dict[str, Compressor] = {
    "PowerSGD(rank=1)": PowerSGD(1),
    "PowerSGD(rank=4)": PowerSGD(4),
    "PowerSGD(rank=16)": PowerSGD(16),
    "TopK(density=0.01)": TopK(density=0.01),
    "SignNorm()": SignNorm(),
    "LQSGD(rank=4, bits=8)": LQSGD(rank=4, bits=8),
}


class Sleeping(nn.Module):
    """Parameters whose gradients are given. Its passes sleep, and so need no core.

    The backward pass hands over one gradient after the other, each after its share of the time.
    """

    def __init__(self, gradients: Sequence[Tensor]) -> None:
        super().__init__()
        self.gradients = gradients
        self.weights = nn.ParameterList([nn.Parameter(torch.zeros_like(g)) for g in gradients])
        total = sum(gradient.numel() for gradient in gradients)
        self.shares = [BACKWARD * gradient.numel() / total for gradient in gradients]

    def forward(self) -> Tensor:
        """Returns a scalar whose gradients are those that were given."""
        time.sleep(FORWARD)
        value = torch.zeros((), requires_grad=True)
        for gradient, weight, share in zip(self.gradients, self.weights, self.shares, strict=True):
            value = _HandOver.apply(value, weight, gradient, share)
        return value


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor, gradient: Tensor, share: float) -> Tensor:
        ctx.given, ctx.share = gradient, share
        return value.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        time.sleep(ctx.share)
        return gradients[0], ctx.given.clone(), None, None


def whole_step(model: nn.Module, optimizer: Any) -> Callable[[], None]:
    """Forward, backward, exchange and update."""

    def step() -> None:
        optimizer.zero_grad()
        model().backward()
        optimizer.step()

    return step


def compressing(parameters: Any, name: str, transport: Any = None) -> ErrorFeedbackSGD:
    """An optimizer with one of the candidates, over the network or over nothing."""
    options = {"lr": 1e-6, "momentum": 0.9, "momentum_form": "sgd", "process_group": transport}
    return ErrorFeedbackSGD(parameters, compressor=CANDIDATES[name], **options)


def all_reduce(nbytes: int) -> Runner:
    """Averages a buffer, as a compressor does."""
    buffer = torch.zeros(nbytes // 4)
    return Runner(lambda: dist.all_reduce(buffer))


def runners() -> dict[str, Runner]:
    """Everything that is measured."""
    gradients = made_gradients(SHAPES, dist.get_rank())
    found = {name: all_reduce(nbytes) for name, nbytes in PROBES.items()}
    plain = Sleeping(gradients)
    sgd = torch.optim.SGD(plain.parameters(), lr=1e-6, momentum=0.9, foreach=True)
    found[PLAIN] = Runner(whole_step(DistributedDataParallel(plain), sgd))
    alone = Sleeping(gradients)
    update = torch.optim.SGD(alone.parameters(), lr=1e-6, momentum=0.9, foreach=True)
    found[f"compute of {UPDATE}"] = Runner(update.step, lambda: give(alone))
    for name in CANDIDATES:
        own, other = Sleeping(gradients), Sleeping(gradients)
        found[name] = Runner(whole_step(own, compressing(own.parameters(), name)))
        echo = compressing(other.parameters(), name, Echo(dist.get_world_size()))
        found[f"compute of {name}"] = Runner(echo.step, lambda other=other: give(other))
    return found


def give(model: Sleeping) -> None:
    """Sets the gradients without a backward pass."""
    for weight, gradient in zip(model.weights, model.gradients, strict=True):
        weight.grad = gradient.clone()


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Measures all of it, together with the other workers."""
    assert math.prod(SHAPES[0]) == 2**18
    clock = clock_for(torch.device("cpu"))
    samples = measure(
        runners(), job["rounds"], warm_up=job["warm_up"], clock=clock, barrier=dist.barrier
    )
    return slowest(samples)


if __name__ == "__main__":
    work(run)
