"""Two limits of PyTorch's powerSGD_hook on gloo, and the same with efsgd.

torchrun --standalone --nproc-per-node 2 docs/hook_limits.py          # zero gradients
torchrun --standalone --nproc-per-node 2 docs/hook_limits.py buckets  # several buckets
"""

import os
import sys
import threading
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import efsgd

RANKS = (1, 2, 4)
STEPS = 30
PATIENCE = 10.0  # seconds for all steps, which take a fraction of one

Attach = Callable[[DistributedDataParallel], object]


def with_hook(**options: float) -> Attach:
    """Registers torch's hook as early as it may start."""

    def attach(ddp: DistributedDataParallel) -> None:
        state = PowerSGDState(None, start_powerSGD_iter=2, **options)
        ddp.register_comm_hook(state, powerSGD_hook)

    return attach


def with_efsgd(rank: int) -> Attach:
    """Registers that of this package, also from the third step on."""

    def attach(ddp: DistributedDataParallel) -> object:
        sgd = torch.optim.SGD(ddp.parameters(), lr=0.0)
        return efsgd.attach(ddp, sgd, efsgd.PowerSGD(rank=rank), start_compressing_at=2)

    return attach


class Branches(nn.Module):
    """Two layers; the second one counts as much as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, inputs: Tensor, weight: float) -> Tensor:
        losses = [layer(inputs).square().mean() for layer in (self.first, self.second)]
        return losses[0] + weight * losses[1]


def norm_after_zeros(attach: Attach) -> float:
    """The norm of a layer's gradient in the eighth step, after zeros in the first four."""
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Branches())
    attach(ddp)
    for step in range(8):
        ddp.zero_grad()
        ddp(torch.randn(8, 64), 0.0 if step < 4 else 1.0).backward()
    return float(ddp.module.second.weight.grad.norm())


def zeros() -> list[str]:
    """The lines of a table in markdown."""
    lines = ["| rank | hook, epsilon 0 | hook, epsilon 1e-8 | efsgd |", "|---:|---:|---:|---:|"]
    for rank in RANKS:
        hooks = [
            with_hook(matrix_approximation_rank=rank, orthogonalization_epsilon=epsilon)
            for epsilon in (0, 1e-8)
        ]
        norms = [norm_after_zeros(attach) for attach in (*hooks, with_efsgd(rank))]
        lines.append(f"| {rank} | {' | '.join(f'{norm:.2f}' for norm in norms)} |")
    return lines


def steps_with_buckets(attach: Attach) -> int:
    """Steps that end in time, of `STEPS`, where DDP makes several buckets of a model."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)])
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.2)
    attach(ddp)
    done = [0]

    def train() -> None:
        for _ in range(STEPS):
            ddp.zero_grad()
            ddp(torch.randn(64, 256)).square().mean().backward()
            done[0] += 1

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return done[0]


def main() -> None:
    """Entry point."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    if sys.argv[1:] == ["buckets"]:
        lines = [f"efsgd: {steps_with_buckets(with_efsgd(4))} of {STEPS} steps"]
        found = steps_with_buckets(with_hook(matrix_approximation_rank=4, min_compression_rate=1.0))
        lines.append(f"powerSGD_hook: {found} of {STEPS} steps")
    else:
        lines = zeros()
    if dist.get_rank() == 0:
        print("\n".join(lines), flush=True)
    # Callbacks of torch's hook may hold the group in one of gloo's threads, which cannot end it.
    os._exit(0)


if __name__ == "__main__":
    main()
