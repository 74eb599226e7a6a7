"""What a training did, and how far it has come."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class History:
    """What one training did; most lists have one entry per epoch, after one before training.

    Attributes:
        steps: steps taken.
        bytes_sent: bytes this worker had handed to collectives for these steps and for decisions.
        quality: quality on the test set.
        training_loss: mean loss over the epoch on this worker; nan before training.
        seconds_per_batch: median time of forward, backward, exchange and update.
        bytes_per_epoch: bytes this worker handed to collectives in the last epoch.
        seconds: of all steps and decisions.
        decision_bytes_sent: bytes of decisions, which are part of `bytes_sent`.
        windows: with a rank scheduler, how many steps were taken before each window.
        lrs: the learning rate with which each window began.
        ranks: of each compressed parameter in each window, by the parameter's name.
    """

    steps: list[int] = field(default_factory=list)
    bytes_sent: list[int] = field(default_factory=list)
    quality: list[float] = field(default_factory=list)
    training_loss: list[float] = field(default_factory=list)
    seconds_per_batch: float = 0.0
    bytes_per_epoch: int = 0
    seconds: float = 0.0
    decision_bytes_sent: int = 0
    windows: list[int] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    ranks: dict[str, list[float]] = field(default_factory=dict)

    def add_window(self, step: int, lr: float, ranks: Mapping[str, float]) -> None:
        """A window begins after this many steps, with these values."""
        self.windows.append(step)
        self.lrs.append(lr)
        for name, rank in ranks.items():
            self.ranks.setdefault(name, []).append(rank)


@dataclass
class Progress:
    """How far a training has come.

    Attributes:
        epoch: the present one, from 0.
        batch: batches of it that were trained on.
        bytes_sent: bytes this worker has handed to collectives for steps taken and decisions.
        decision_bytes_sent: those of decisions.
        losses: of the present epoch's batches.
        seconds: of all steps, each with the decision after it; there are as many as steps taken.
        history: of the epochs before.
    """

    epoch: int = 0
    batch: int = 0
    bytes_sent: int = 0
    decision_bytes_sent: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    history: History = field(default_factory=History)
