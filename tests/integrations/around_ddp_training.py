"""Models, batches and training loops that the workers of `test_around_ddp.py` share."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

from efsgd import PowerSGDOptimizer
from efsgd.wire.compare import checksum

INPUTS, HIDDEN, OUTPUTS = 20, 24, 12
OPTIONS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "rank": 2}
STEPS, MICRO_BATCHES = 6, 2


class Model(nn.Sequential):
    """Layers in a row, with a forward that torch.compile does not take for a part of torch."""

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = super().forward(inputs)
        return outputs


def make_model(*layers: nn.Module) -> Model:
    """Two matrices that are compressed and two biases that are not, the same on every worker."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, last = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, OUTPUTS)
    return Model(first, *layers, nn.ReLU(), last)


def make_optimizer(model: nn.Module, **options: Any) -> PowerSGDOptimizer:
    """An optimizer of all its parameters, with their names."""
    return PowerSGDOptimizer(model.named_parameters(), **{**OPTIONS, **options})


def batch(worker: int, number: int, size: int = 8) -> Tensor:
    """Inputs [size, INPUTS] that only this worker has."""
    generator = torch.Generator().manual_seed(1000 * worker + number)
    return torch.randn(size, INPUTS, generator=generator)


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Some loss, averaged over the batch, in the dtype of the model."""
    dtype = next(model.parameters()).dtype
    outputs: Tensor = model(inputs.to(dtype))
    return (outputs - 1).square().mean()


def plain_ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """DDP that averages gradients."""
    return DistributedDataParallel(model, **options)


def quiet_ddp(model: nn.Module, **options: Any) -> DistributedDataParallel:
    """DDP that leaves gradients as they are."""
    ddp = plain_ddp(model, **options)
    ddp.register_comm_hook(None, noop_hook)
    return ddp


def local_gradients(model: nn.Module, worker: int, step: int, *, no_sync: bool = False) -> None:
    """Accumulates the gradients of a step: forward and backward of each of its micro-batches."""
    context = model.no_sync() if no_sync else contextlib.nullcontext()
    with context:
        for part in range(MICRO_BATCHES):
            inputs = batch(worker, step * MICRO_BATCHES + part)
            (loss_of(model, inputs) / MICRO_BATCHES).backward()


def train(
    wrap: Callable[[nn.Module], nn.Module], worker: int, *, no_sync: bool = False
) -> PowerSGDOptimizer:
    """Trains a fresh model that is wrapped so, and returns its optimizer."""
    model = make_model()
    wrapped = wrap(model)
    optimizer = make_optimizer(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        local_gradients(wrapped, worker, step, no_sync=no_sync)
        optimizer.step()
    return optimizer


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def checksums(tensors: Iterable[Tensor]) -> list[int]:
    """One for each tensor: equal where all bits are."""
    return [checksum(tensor.detach().contiguous()) for tensor in tensors]


def fingerprint(*optimizers: PowerSGDOptimizer) -> dict[str, list[int]]:
    """Checksums of parameters and of each kind of state, errors among them."""
    found: dict[str, list[int]] = {}
    for optimizer in optimizers:
        for parameter in parameters_of(optimizer):
            found.setdefault("parameters", []).extend(checksums([parameter]))
            for name, value in sorted(optimizer.state[parameter].items()):
                found.setdefault(name, []).extend(checksums([value]))
    return found


def values(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The elements of each, for a report."""
    return [tensor.detach().flatten().tolist() for tensor in tensors]
