"""What the workers of all frameworks have in common: a task, a plain loop, and what they report."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

from efsgd import PowerSGDOptimizer
from efsgd.checkpoint import averaging_
from efsgd.testing import lockstep, step_together
from efsgd.wire.compare import checksum
from tests.integrations.around_ddp_training import fingerprint

WORKERS = 2
BATCH = 16  # examples of one worker in one backward pass
ACCUMULATE = 2  # backward passes of a step
CLIP = 0.3  # the norm of each worker's own gradient
EPOCHS = 3
SAVED_AFTER = 2  # epochs
EXAMPLES = 192  # of which two workers make three steps in an epoch
RATES = [0.1] * 3 + [0.05] * 3 + [0.025] * 3  # of each step, by every framework's scheduler


@cache  # it is read from a compressed table of all digits
def digits() -> TensorDataset:
    found = load_digits()
    inputs = torch.tensor(found.data[:EXAMPLES] / 16, dtype=torch.float32)
    return TensorDataset(inputs, torch.tensor(found.target[:EXAMPLES]))


def network() -> torch.nn.Module:
    """A small classifier, the same at each call."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(5)
        return torch.nn.Sequential(
            torch.nn.Linear(64, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10)
        )


def plain(
    models: Sequence[torch.nn.Module],
    losses: Callable[[torch.nn.Module, int, int], Iterator[Tensor]],
    *,
    averaged_after: Sequence[int],
    clip: float | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """What two workers report of nine steps of an ordinary loop, in this thread.

    `losses` gives those of a model, a worker and a step, one for each backward pass.
    """
    options = {"momentum": 0.9, "rank": 2, "momentum_form": "sgd", **options}
    optimizers = [PowerSGDOptimizer(model.parameters(), **options) for model in models]
    watches = [Watch(optimizer) for optimizer in optimizers]
    for step, rate in enumerate(RATES):
        for worker, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            for loss in losses(model, worker, step):
                loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        step_together(optimizers)
        for watch in watches:
            watch.note()
        if step + 1 in averaged_after:
            lockstep([averaging_(optimizer) for optimizer in optimizers])
    return [watch.report() for watch in watches]


def plain_digits(
    order: Callable[[int, int], Sequence[int]], *, precision: torch.dtype, **options: Any
) -> list[dict[str, Any]]:
    """`plain` with the network and the digits, in the `order` of a worker and an epoch."""
    inputs, targets = digits().tensors
    per_epoch = EXAMPLES // (WORKERS * BATCH)

    def losses(model: torch.nn.Module, worker: int, step: int) -> Iterator[Tensor]:
        for number in range(step * ACCUMULATE, (step + 1) * ACCUMULATE):
            epoch, place = divmod(number, per_epoch)
            own = list(order(worker, epoch)[place * BATCH : (place + 1) * BATCH])
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                outputs = model(inputs[own])
            yield torch.nn.functional.cross_entropy(outputs.float(), targets[own]) / ACCUMULATE

    models = [network() for _ in range(WORKERS)]
    return plain(models, losses, averaged_after=[3 * SAVED_AFTER], **options)


class Watch:
    """Notes what an optimizer is given at each step."""

    def __init__(self, optimizer: PowerSGDOptimizer) -> None:
        self.optimizer = optimizer
        self.rates: list[float] = []
        self.norms: list[float] = []
        self.gradients: list[list[int]] = []
        optimizer.register_step_post_hook(lambda *_: self.note())

    def note(self) -> None:
        """Called after each `step()`; after `step_together`, which is none, by the plain loop."""
        gradients = list(_gradients(self.optimizer))
        self.rates.append(float(self.optimizer.param_groups[0]["lr"]))
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        self.gradients.append([checksum(gradient) for gradient in gradients])

    def report(self, **more: Any) -> dict[str, Any]:
        """All of it, for `write`."""
        return {
            "rates": self.rates,
            "norms": self.norms,
            "gradients": self.gradients,
            "stats": self.optimizer.communication_stats(),
            "trained": fingerprint(self.optimizer),
            **more,
        }


def _gradients(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from (p.grad for p in group["params"] if p.grad is not None)


def warned(caught: list[warnings.WarningMessage], words: str) -> bool:
    """Whether one of the warnings has these words."""
    return any(words in str(warning.message) for warning in caught)


def write(folder: Path, worker: int, report: dict[str, Any]) -> None:
    """Leaves the report of one worker for the test."""
    (folder / f"{worker}.json").write_text(json.dumps(report))
