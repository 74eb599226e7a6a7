"""One worker of `benchmarks.adamw_steps`: everything that is measured there.

`namespaces.Network` starts it. Its only argument is a JSON file::

    rounds        how many steps of each candidate are measured
    warm_up       how many come before
    timeout       seconds, for every wait
    output        where worker 0 writes the samples, by candidate
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from benchmarks.timing import Runner, clock_for, measure
from benchmarks.worker import slowest, work
from efsgd import GradientAverager, PowerSGD
from efsgd.ddp import CompressionState, compress
from examples.models import CifarResNet18

RANK, BATCH = 4, 16
NOTHING, FORWARD, BACKWARD = "nothing sent", "forward alone", "forward and backward alone"
EXCHANGE, PLAIN = "exchange alone", "AdamW under DDP"
ONE_BUCKET = 10_000  # megabytes


def plain_ddp(model: nn.Module) -> nn.Module:
    """As it comes."""
    return DistributedDataParallel(model)


def torch_hook(model: nn.Module) -> nn.Module:
    """torch's hook at the same rank, from its third step on."""
    ddp = DistributedDataParallel(model, bucket_cap_mb=ONE_BUCKET)
    options = {"matrix_approximation_rank": RANK, "start_powerSGD_iter": 2}
    ddp.register_comm_hook(PowerSGDState(None, **options), powerSGD_hook)
    return ddp


def our_hook(model: nn.Module) -> nn.Module:
    """`efsgd.ddp`, as it comes."""
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(CompressionState(ddp, PowerSGD(RANK)), compress)
    return ddp


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    PLAIN: plain_ddp,
    "torch's hook, rank 4, one bucket": torch_hook,
    "efsgd.ddp, rank 4": our_hook,
}


def runners() -> dict[str, Runner]:
    """Everything that is measured."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    images = torch.randn(BATCH, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (BATCH,), generator=generator)

    def loss(net: nn.Module) -> torch.Tensor:
        return cross_entropy(net(images), labels)

    def trained(net: nn.Module, averager: GradientAverager | None = None) -> Runner:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            loss(net).backward()
            if averager is not None:
                averager.average_()
            optimizer.step()

        return Runner(step)

    def model() -> nn.Module:
        torch.manual_seed(1)
        return CifarResNet18()

    found = {name: trained(wrap(model())) for name, wrap in WRAPPERS.items()}
    for name, options in (
        ("GradientAverager, rank 4", {}),
        ("GradientAverager, rank 4, buckets of 8 MiB", {"bucket_bytes": 8 * 2**20}),
    ):
        own = model()
        found[name] = trained(own, GradientAverager(own.parameters(), PowerSGD(RANK), **options))
    found[NOTHING] = trained(model())
    own, other = model(), model()
    found[FORWARD] = Runner(lambda: loss(other))
    found[BACKWARD] = Runner(lambda: loss(other).backward(), other.zero_grad)
    averager = GradientAverager(own.parameters(), PowerSGD(RANK))
    found[EXCHANGE] = Runner(averager.average_, lambda: loss(own).backward())
    return found


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Measures all of it, together with the other workers."""
    clock = clock_for(torch.device("cpu"))
    samples = measure(
        runners(), job["rounds"], warm_up=job["warm_up"], clock=clock, barrier=dist.barrier
    )
    return slowest(samples)


if __name__ == "__main__":
    work(run)
