"""What the workers of all frameworks have in common: a task, a plain loop, and what they report."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

from efsgd import GradientAverager, PowerSGD, PowerSGDOptimizer
from efsgd.checkpoint import averaging_
from efsgd.testing import lockstep, step_together
from efsgd.wire.compare import checksum
from tests.integrations.around_ddp_training import fingerprint

WORKERS = 2
BATCH = 16  # examples of one worker in one backward pass
ACCUMULATE = 2  # backward passes of a step
CLIP = 0.3  # the norm of the averaged gradient
EPOCHS = 3
SAVED_AFTER = 2  # epochs
EXAMPLES = 192  # of which two workers make three steps in an epoch
RATES = [0.02] * 3 + [0.01] * 3 + [0.005] * 3  # of each step, by the scheduler


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
    make: "Callable[[torch.nn.Module], Trained]",
    *,
    rates: Sequence[float] = RATES,
    averaged_after: Sequence[int],
    clip: float | None = None,
) -> list[dict[str, Any]]:
    """What two workers report of nine steps of an ordinary loop, in this thread.

    `losses` gives those of a model, a worker and a step, one for each backward pass; `make` what
    each model is trained with. The norm of the averaged gradients is clipped.
    """
    workers = [make(model) for model in models]
    watches = [Watch(trained) for trained in workers]
    exchanging = [trained.exchanging for trained in workers]
    for step, rate in enumerate(rates):
        for worker, (model, trained) in enumerate(zip(models, workers, strict=True)):
            for group in trained.optimizer.param_groups:
                group["lr"] = rate
            trained.optimizer.zero_grad()
            for loss in losses(model, worker, step):
                loss.backward()
        step_together(exchanging)
        for model, trained, watch in zip(models, workers, watches, strict=True):
            if trained.optimizer is trained.exchanging:
                watch.note()
            else:
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                trained.optimizer.step()
        if step + 1 in averaged_after:
            lockstep([averaging_(each) for each in exchanging])
    return [watch.report() for watch in watches]


@dataclass(frozen=True)
class Trained:
    """An optimizer, and what exchanges its gradients: itself, or an averager."""

    optimizer: torch.optim.Optimizer
    exchanging: Any


def own(model: torch.nn.Module, **options: Any) -> Trained:
    """With an optimizer of this package."""
    options = {"momentum": 0.9, "rank": 2, "momentum_form": "sgd", **options}
    optimizer = PowerSGDOptimizer(model.named_parameters(), **options)
    return Trained(optimizer, optimizer)


def adamw(model: torch.nn.Module) -> Trained:
    """With AdamW, and an averager beside it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATES[0])
    return averaged(optimizer)


def averaged(optimizer: torch.optim.Optimizer) -> Trained:
    """With an averager for an optimizer: what `efsgd.attach` is to be equal to."""
    averager = GradientAverager(optimizer.param_groups, compressor=PowerSGD(rank=2))
    return Trained(optimizer, averager)


def plain_digits(
    make: Callable[[torch.nn.Module], Trained],
    order: Callable[[int, int], Sequence[int]],
    *,
    precision: torch.dtype,
    clip: float | None = None,
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
    return plain(models, losses, make, averaged_after=[3 * SAVED_AFTER], clip=clip)


class Watch:
    """Notes what an optimizer is given at each step."""

    def __init__(self, trained: Trained) -> None:
        self.trained = trained
        self.rates: list[float] = []
        self.norms: list[float] = []
        self.gradients: list[list[int]] = []
        trained.optimizer.register_step_post_hook(lambda *_: self.note())

    def note(self) -> None:
        """Called after each `step()`; after `step_together`, which is none, by the plain loop."""
        gradients = list(_gradients(self.trained.optimizer))
        self.rates.append(float(self.trained.optimizer.param_groups[0]["lr"]))
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        self.gradients.append([checksum(gradient) for gradient in gradients])

    def report(self, **more: Any) -> dict[str, Any]:
        """All of it, for `write`."""
        return {
            "rates": self.rates,
            "norms": self.norms,
            "gradients": self.gradients,
            "stats": self.trained.exchanging.communication_stats(),
            "trained": fingerprint(self.trained.optimizer) | fingerprint(self.trained.exchanging),
            **more,
        }


def _gradients(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from (p.grad for p in group["params"] if p.grad is not None)


def warned(caught: list[warnings.WarningMessage], words: str) -> bool:
    """Whether one of the warnings has these words."""
    return any(words in str(warning.message) for warning in caught)


def error_of(call: Callable[..., Any], *given: Any, **options: Any) -> str:
    """The kind and words of what a call raises."""
    try:
        call(*given, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def write(folder: Path, worker: int, report: dict[str, Any]) -> None:
    """Leaves the report of one worker for the test."""
    (folder / f"{worker}.json").write_text(json.dumps(report))
