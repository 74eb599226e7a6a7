"""Hyper-parameters of a training."""

from dataclasses import dataclass
from typing import Any


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
        windows_per_epoch: rank schedulers may decide so many times in an epoch.
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
    windows_per_epoch: int = 1

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
