"""Gradients that are sent uncompressed: from PyTorch's powerSGD_hook, and from efsgd.

torchrun --standalone --nproc-per-node 2 docs/hook_drift.py            # in bfloat16
torchrun --standalone --nproc-per-node 2 docs/hook_drift.py float32

Each worker has one fixed gradient, another one than the other workers, as if their data differed.
The right answer is therefore the same in every step: the mean of the workers' gradients.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from efsgd import PowerSGDOptimizer

STEPS = (10, 50, 100, 200, 400)


def loss_of(model: nn.Module, worker: int, dtype: torch.dtype) -> Tensor:
    """Linear in the parameters. Sums of integers are exact in any order, until they are stored."""
    generator = torch.Generator().manual_seed(worker)
    inputs = torch.randint(-8, 9, (8, 64), generator=generator).to(dtype)
    factors = torch.randint(-100, 101, (8, 64), generator=generator).to(dtype)
    return (model(inputs) * factors).sum()


def mean_bias_gradient(worker: int, dtype: torch.dtype) -> Tensor:
    """What every worker should get for the bias, [64] float64."""
    model = nn.Linear(64, 64).to(dtype)
    loss_of(model, worker, dtype).backward()
    mean = model.bias.grad.double()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def from_hook(worker: int, dtype: torch.dtype) -> dict[int, Tensor]:
    """The gradient of the bias after some numbers of steps with the hook, at its defaults."""
    ddp = DistributedDataParallel(nn.Linear(64, 64).to(dtype))
    state = PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    ddp.register_comm_hook(state, powerSGD_hook)
    found = {}
    for step in range(1, STEPS[-1] + 1):
        ddp.zero_grad()
        loss_of(ddp, worker, dtype).backward()
        if step in STEPS:
            found[step] = ddp.module.bias.grad.clone()
    return found


def from_efsgd(worker: int, dtype: torch.dtype) -> dict[int, Tensor]:
    """The same with this package, for every step: a step of length 1 from zero is the gradient."""
    model = nn.Linear(64, 64).to(dtype)
    optimizer = PowerSGDOptimizer(model.parameters(), lr=1.0, rank=1, momentum_form="sgd")
    found = {}
    for step in range(1, STEPS[-1] + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        optimizer.zero_grad()
        loss_of(model, worker, dtype).backward()
        optimizer.step()
        found[step] = -model.bias.detach().clone()
    return found


def percent(gradient: Tensor, mean: Tensor) -> float:
    """The norm of the error, in percent of the norm of the mean."""
    return 100 * float((gradient.double() - mean).norm() / mean.norm())


def table(of_hook: dict[int, Tensor], own: dict[int, Tensor], mean: Tensor) -> list[str]:
    """The lines of a table in markdown."""
    lines = ["| step | `powerSGD_hook` | efsgd |", "|---:|---:|---:|"]
    for step in STEPS:
        errors = percent(of_hook[step], mean), percent(own[step], mean)
        lines += [f"| {step} | {errors[0]:.2f} % | {errors[1]:.2f} % |"]
    return lines


def main() -> None:
    """Entry point."""
    torch.set_num_threads(1)
    dtype = getattr(torch, sys.argv[1]) if len(sys.argv) > 1 else torch.bfloat16
    dist.init_process_group("gloo")
    worker = dist.get_rank()
    mean = mean_bias_gradient(worker, dtype)
    lines = table(from_hook(worker, dtype), from_efsgd(worker, dtype), mean)
    if worker == 0:
        print("\n".join(lines), flush=True)
    dist.barrier()
    # Callbacks of torch's hook may hold the group in one of gloo's threads, which cannot end it.
    os._exit(0)


if __name__ == "__main__":
    main()
