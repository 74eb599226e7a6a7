"""The training loop of all examples, for any task and any optimizer."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from efsgd import average_buffers
from examples.checkpointing import Checkpoints
from examples.distributed import Workers
from examples.history import History, Progress
from examples.optimizers import Optimizer, Scheduler
from examples.settings import Settings

Batch = tuple[Tensor, Tensor]


class Task(Protocol):
    """What is learned: data, loss, and the measure of quality."""

    quality: str
    steps_per_epoch: int

    def batches(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This worker's batches of one epoch, from the batch of number `start`."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch, a scalar."""

    def evaluate(self, model: nn.Module) -> float:
        """Quality on the test set; called on all workers, with the same result on all."""

    def state_dict(self) -> dict[str, Any]:
        """What `loss` keeps from one batch of an epoch to the next."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes that up again."""


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


def prepare(workers: Workers, seed: int) -> None:
    """Seeds the initialization, the same on every worker, and takes one thread for each."""
    torch.manual_seed(seed)
    if workers.device.type == "cpu" and workers.world_size > 1:
        torch.set_num_threads(1)


def seed_worker(seed: int, worker: int) -> None:
    """Seeds dropout differently on every worker; call it when the model has been built."""
    torch.manual_seed(1_000_003 * seed + worker + 1)


@dataclass
class Training:
    """Trains a model, tests it after every epoch, and can be saved and taken up after any step.

    Attributes:
        task: what is learned.
        model: called by the task; its parameters are those of the optimizer.
        optimizer: averages over the workers itself, or the model does in backward.
        settings: hyper-parameters.
        workers: the group this worker belongs to.
        seed: of the order of the data.
        scheduler: of ranks, steps at the end of each window but the last; None for fixed ranks.
        progress: how far it has come.
    """

    task: Task
    model: nn.Module
    optimizer: Optimizer
    settings: Settings
    workers: Workers
    seed: int
    scheduler: Scheduler | None = None
    progress: Progress = field(default_factory=Progress)
    # By processes that trained before this one: bytes in all, and in decisions.
    _sent_before: tuple[int, int] = field(default=(0, 0), init=False)

    def run(
        self,
        report: Callable[[int, float, float], None] = lambda step, loss, quality: None,
        checkpoints: Checkpoints | None = None,
    ) -> History:
        """Trains to the end, from the newest checkpoint if there is one.

        Args:
            report: called after every step with the number of steps, the loss and the last quality.
            checkpoints: where to go on from, and to save to; None for neither.

        Returns:
            The history of the whole training as this worker saw it.
        """
        progress, history = self.progress, self.progress.history
        if checkpoints is not None and (saved := checkpoints.load()) is not None:
            self.load_state_dict(saved)
            progress, history = self.progress, self.progress.history
        if not history.steps:
            self._test(loss=float("nan"))
            self._begin_window()
        while progress.epoch < self.settings.epochs:
            for batch in self.task.batches(self.seed, progress.epoch, progress.batch):
                self._step(batch)
                step = len(progress.seconds)
                if self._ends_window():
                    self._decide()
                report(step, progress.losses[-1], history.quality[-1])
                if checkpoints is not None and checkpoints.is_due(step):
                    checkpoints.save(step, self.state_dict())
            self._test(sum(progress.losses) / len(progress.losses))
            progress.epoch, progress.batch, progress.losses = progress.epoch + 1, 0, []
        if progress.seconds:
            history.seconds_per_batch = statistics.median(progress.seconds)
            history.seconds = sum(progress.seconds)
            history.decision_bytes_sent = progress.decision_bytes_sent
            history.bytes_per_epoch = history.bytes_sent[-1] - history.bytes_sent[-2]
        return history

    def state_dict(self) -> dict[str, Any]:
        """All that this worker needs to go on from here, to the bit."""
        random = {"cpu": torch.get_rng_state()}
        if self.workers.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.workers.device)
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "task": self.task.state_dict(),
            "random": random,
            "progress": asdict(self.progress),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes up a training of the same model, task and settings."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        self.task.load_state_dict(saved["task"])
        torch.set_rng_state(saved["random"]["cpu"])
        if "cuda" in saved["random"]:
            torch.cuda.set_rng_state(saved["random"]["cuda"], self.workers.device)
        progress = saved["progress"]
        self.progress = Progress(**{**progress, "history": History(**progress["history"])})
        self._sent_before = self.progress.bytes_sent, self.progress.decision_bytes_sent

    def _step(self, batch: Batch) -> None:
        """Forward, backward, exchange and update."""
        progress = self.progress
        self._set_lr()
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model, batch)
        loss.backward()
        if self.settings.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        progress.losses.append(loss.item())  # waits for the device
        progress.seconds.append(time.perf_counter() - start)
        progress.batch += 1
        self._count_bytes()

    def _set_lr(self) -> float:
        """The learning rate of the next step, which it also returns."""
        progress = self.progress
        epoch = progress.epoch + progress.batch / self.task.steps_per_epoch
        lr = self.settings.lr_at(epoch, self.workers.world_size)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _count_bytes(self) -> None:
        """Of steps and decisions; checks come on top of a training, and are left out."""
        sent = self.optimizer.communication_stats()
        before, decided_before = self._sent_before
        own = sent["total_bytes_sent"] - sent["check_bytes_sent"]
        self.progress.bytes_sent = before + own
        decided = sent.get("decision_bytes_sent", 0)
        self.progress.decision_bytes_sent = decided_before + decided

    def _ends_window(self) -> bool:
        """Whether the last step was the last of a window, and not of the whole training."""
        steps, windows = self.task.steps_per_epoch, self.settings.windows_per_epoch
        batch = self.progress.batch
        is_last = batch == steps and self.progress.epoch == self.settings.epochs - 1
        return batch * windows // steps > (batch - 1) * windows // steps and not is_last

    def _decide(self) -> None:
        """Ends a window; the decision's time counts as the last step's."""
        if self.scheduler is None:
            return
        self._set_lr()  # a rank scheduler follows that of the next step
        start = time.perf_counter()
        self.scheduler.step()
        self.progress.seconds[-1] += time.perf_counter() - start
        self._count_bytes()
        self._begin_window()

    def _begin_window(self) -> None:
        """Adds learning rate and ranks to the history."""
        if self.scheduler is not None:
            ranks = self.scheduler.get_last_ranks()
            self.progress.history.add_window(len(self.progress.seconds), self._set_lr(), ranks)

    def _test(self, loss: float) -> None:
        """Adds an entry to the history; `loss` is the mean over the epoch."""
        history = self.progress.history
        average_buffers(self.model)
        self.model.eval()
        with torch.no_grad():
            history.quality.append(self.task.evaluate(self.model))
        self.model.train()
        history.steps.append(len(self.progress.seconds))
        history.bytes_sent.append(self.progress.bytes_sent)
        history.training_loss.append(loss)
