"""The training loop of all examples, for any task and any optimizer."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from examples.distributed import Workers

__all__ = ["History", "Settings", "Task", "parameter_groups", "seed_worker", "train"]

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of one training.

    Attributes:
        epochs: passes over the data.
        batch_size: images, or streams of text, per worker and step.
        lr: learning rate of one worker; it is multiplied by the number of workers.
        warmup_epochs: the rate rises from that of one worker within this time.
        decay_at: fractions of the training at which the rate is divided by ten.
        momentum: momentum.
        nesterov: Nesterov's form, where torch's form of momentum is used.
        weight_decay: for all parameters but those of BatchNorm.
        clip: largest norm of the gradient, a worker's own with PowerSGDOptimizer and the average
            under DistributedDataParallel; None for no limit.
        momentum_form: of PowerSGDOptimizer: "sgd", or "paper".
    """

    epochs: int
    batch_size: int
    lr: float
    warmup_epochs: float = 0
    decay_at: tuple[float, ...] = ()
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    clip: float | None = None
    momentum_form: str = "sgd"

    def of_sgd(self) -> dict[str, Any]:
        """Arguments of torch.optim.SGD, other than the parameters and their weight decay."""
        return {"lr": self.lr, "momentum": self.momentum, "nesterov": self.nesterov}

    def of_ours(self) -> dict[str, Any]:
        """The same for PowerSGDOptimizer; the paper's form of momentum has no Nesterov variant."""
        is_paper = self.momentum_form == "paper"
        nesterov = self.nesterov and not is_paper
        return {**self.of_sgd(), "nesterov": nesterov, "momentum_form": self.momentum_form}

    def lr_at(self, epoch: float, world_size: int) -> float:
        """The learning rate after `epoch` epochs, which need not be whole, with these workers."""
        warm = min(epoch / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0
        decays = sum(epoch >= fraction * self.epochs for fraction in self.decay_at)
        return self.lr * (1 + (world_size - 1) * warm) / 10**decays


class Task(Protocol):
    """What is learned: data, loss, and the measure of quality."""

    quality: str
    steps_per_epoch: int

    def batches(self, seed: int, epoch: int) -> Iterator[Batch]:
        """This worker's batches of one epoch."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar."""

    def evaluate(self, model: nn.Module) -> float:
        """Quality on the test set; called on all workers, with the same result on all."""


class Optimizer(Protocol):
    """What the loop asks of an optimizer."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self) -> None:
        """Forgets the gradients."""

    def step(self) -> Any:
        """Updates the parameters."""

    def communication_stats(self) -> dict[str, Any]:
        """Figures of what was sent, `total_bytes_sent` among them."""


@dataclass
class History:
    """What one training did; the lists have one entry per epoch, after an entry before training.

    Attributes:
        steps: steps taken.
        bytes_sent: bytes this worker had handed to collectives.
        quality: quality on the test set.
        training_loss: mean loss over the epoch on this worker; nan before training.
        seconds_per_batch: median time of forward, backward, exchange and update.
        bytes_per_epoch: bytes this worker handed to collectives in the last epoch.
    """

    steps: list[int] = field(default_factory=list)
    bytes_sent: list[int] = field(default_factory=list)
    quality: list[float] = field(default_factory=list)
    training_loss: list[float] = field(default_factory=list)
    seconds_per_batch: float = 0.0
    bytes_per_epoch: int = 0


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: the parameters of BatchNorm, which do not decay, and all others."""
    norms = {
        parameter
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters()
    }
    others = [parameter for parameter in model.parameters() if parameter not in norms]
    groups = [{"params": others, "weight_decay": weight_decay}]
    if norms:
        ordered = [parameter for parameter in model.parameters() if parameter in norms]
        groups.append({"params": ordered, "weight_decay": 0.0})
    return groups


def seed_worker(seed: int, worker: int) -> None:
    """Seeds dropout differently on every worker; call it when the model has been built."""
    torch.manual_seed(1_000_003 * seed + worker + 1)


def train(
    task: Task,
    model: nn.Module,
    optimizer: Optimizer,
    settings: Settings,
    workers: Workers,
    seed: int,
    report: Callable[[History, float], None] = lambda history, loss: None,
) -> History:
    """Trains a model and tests it after every epoch.

    Args:
        task: what is learned.
        model: called by the task; its parameters are those of the optimizer.
        optimizer: averages over the workers itself, or the model does in backward.
        settings: hyper-parameters.
        workers: the group this worker belongs to.
        seed: of the order of the data.
        report: called after every step with the history so far and the loss.

    Returns:
        The history of the training as this worker saw it.
    """
    history = History()
    seconds: list[float] = []
    _test(task, model, optimizer, workers, history, steps=0, loss=float("nan"))
    for epoch in range(settings.epochs):
        losses: list[float] = []
        for index, batch in enumerate(task.batches(seed, epoch)):
            lr = settings.lr_at(epoch + index / task.steps_per_epoch, workers.world_size)
            for group in optimizer.param_groups:
                group["lr"] = lr
            start = time.perf_counter()
            losses.append(_step(task, model, optimizer, settings.clip, batch))
            seconds.append(time.perf_counter() - start)
            report(history, losses[-1])
        mean = sum(losses) / len(losses)
        _test(task, model, optimizer, workers, history, len(seconds), mean)
    if seconds:
        history.seconds_per_batch = statistics.median(seconds)
        history.bytes_per_epoch = history.bytes_sent[-1] - history.bytes_sent[-2]
    return history


def _step(
    task: Task, model: nn.Module, optimizer: Optimizer, clip: float | None, batch: Batch
) -> float:
    """Forward, backward, exchange and update; returns the loss, and so waits for the device."""
    optimizer.zero_grad()
    loss = task.loss(model, batch)
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.item()


def _test(
    task: Task,
    model: nn.Module,
    optimizer: Optimizer,
    workers: Workers,
    history: History,
    steps: int,
    loss: float,
) -> None:
    """Adds an entry to the history."""
    workers.average_buffers_(model)
    model.eval()
    with torch.no_grad():
        history.quality.append(task.evaluate(model))
    model.train()
    history.steps.append(steps)
    history.bytes_sent.append(optimizer.communication_stats()["total_bytes_sent"])
    history.training_loss.append(loss)
