"""A tower of layers and its training: by the hook of DDP, or by a `GradientAverager`."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from efsgd import GradientAverager, PowerSGD
from efsgd.ddp import CompressionState, compress
from efsgd.wire.compare import checksum

SIZE, LAYERS, STEPS = 16, 5, 8
BUCKET_BYTES = 2000  # some two layers of float32


class Tower(nn.Module):
    """Layers in a row, of which a call may leave some out, or compute some twice."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, reentrant: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE, dtype=dtype) for _ in range(LAYERS))
        self.reentrant = reentrant

    def forward(self, inputs: Tensor, without: int | None = None) -> Tensor:
        hidden = inputs.to(self.layers[0].weight.dtype)
        for number, layer in enumerate(self.layers):
            if number == without:
                continue
            if self.reentrant:
                hidden.requires_grad_()
                hidden = checkpoint(layer, hidden, use_reentrant=True)
            else:
                hidden = layer(hidden).tanh()
        return hidden


def batch(worker: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * worker + step)
    return torch.randn(4, SIZE, generator=generator)


@dataclass
class Training:
    """One of the two ways to train a tower.

    Attributes:
        hooked: by the hook.
        worker: this worker.
        model: what is trained.
        ddp: arguments of DistributedDataParallel.
        options: of the state or of the averager.
        accumulates: whether each step is made of two backward passes.
        keeps_zeros: whether gradients are set to zero, not to None.
        inline: whether the hook exchanges when all gradients are there, as on accelerators.
        without: which layer a worker leaves out in a step.
        wrap: what is done to the model before DDP gets it.
    """

    hooked: bool
    worker: int
    model: Any = field(default_factory=Tower)
    ddp: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    scaler: Any = None
    accumulates: bool = False
    keeps_zeros: bool = False
    inline: bool = False
    without: Callable[[int, int], int | None] = lambda worker, step: None
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model

    def __post_init__(self) -> None:
        options = {"compressor": PowerSGD(rank=2), "bucket_bytes": BUCKET_BYTES, **self.options}
        compressor = options.pop("compressor")
        self.net = self.wrap(self.model)
        if self.hooked:
            self.net = DistributedDataParallel(self.net, **{"bucket_cap_mb": 0.002, **self.ddp})
            self.state = CompressionState(self.model, compressor, scaler=self.scaler, **options)
            if self.inline:
                self.state._own_group = None
            self.net.register_comm_hook(self.state, compress)
            self.averager = self.state.averager
        else:
            named = self.model.named_parameters()
            self.averager = GradientAverager(named, compressor, **options)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, eps=1e-3)

    def backward(self, step: int, spoil: Callable[[Tensor], Tensor] = lambda loss: loss) -> bool:
        """All gradients of a step, averaged. Returns whether they were."""
        self.optimizer.zero_grad(set_to_none=not self.keeps_zeros)
        without = self.without(self.worker, step)
        for part in range(1 + self.accumulates):
            is_last = part == self.accumulates
            inputs = batch(self.worker, 2 * step + part)
            with contextlib.nullcontext() if is_last else self.quiet():
                loss = spoil(self.net(inputs, without).float().square().mean())
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return self.average()

    def average(self) -> bool:
        """Has gradients averaged, unless that is done already."""
        return self.state.check() if self.hooked else self.averager.average_(self.scaler)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Backward passes within it do not exchange gradients."""
        with self.net.no_sync() if self.hooked else contextlib.nullcontext():
            yield

    def train(self, steps: range = range(STEPS)) -> "Training":
        for step in steps:
            self.step(step)
        return self

    def step(self, step: int, spoil: Callable[[Tensor], Tensor] = lambda loss: loss) -> bool:
        applied = self.backward(step, spoil)
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif applied:
            self.optimizer.step()
        return applied

    def fingerprint(self) -> dict[str, list[int]]:
        """Checksums of parameters, gradients, and of what the averager keeps."""
        found: dict[str, list[int]] = {}
        for given, own in zip(
            self.model.parameters(), self.averager.param_groups[0]["params"], strict=True
        ):
            found.setdefault("parameters", []).append(_checksum(given))
            found.setdefault("gradients", []).append(_checksum(given.grad))
            for name, value in sorted(self.averager.state[own].items()):
                found.setdefault(name, []).append(_checksum(value))
        return found


def _checksum(tensor: Tensor | None) -> int:
    return -1 if tensor is None else checksum(tensor.detach().contiguous())
