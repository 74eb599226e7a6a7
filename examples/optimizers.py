"""What the training loop asks of an optimizer and of a scheduler, and who answers it."""

from typing import Any, Protocol

import torch

from efsgd import GradientAverager


class Optimizer(Protocol):
    """What the loop asks of an optimizer."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters, whose entry "lr" is set before each step."""

    def zero_grad(self) -> None:
        """Forgets the gradients."""

    def step(self) -> Any:
        """Updates the parameters."""

    def communication_stats(self) -> dict[str, Any]:
        """What was sent: `total_bytes_sent`, of which `check_bytes_sent` by checks.

        With a scheduler also `decision_bytes_sent`, the part of its decisions.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes that up again."""


class Scheduler(Protocol):
    """What decides, between two steps, what the next ones send."""

    def step(self) -> None:
        """Ends a window of steps; every worker calls it."""

    def get_last_ranks(self) -> dict[str, int | float]:
        """The rank of each parameter that is compressed, by its name."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes that up again."""


class Wrapped:
    """An optimizer of torch.optim, to which subclasses add what it says of communication.

    Args:
        optimizer: any.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer."""
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        """Forgets the gradients."""
        self.optimizer.zero_grad()

    def step(self) -> Any:
        """Updates the parameters."""
        return self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes that up again."""
        self.optimizer.load_state_dict(state_dict)


class AveragedOptimizer(Wrapped):
    """Any optimizer, on gradients that were compressed and averaged over the workers before.

    Args:
        optimizer: any; every worker has the same.
        averager: of the same parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, averager: GradientAverager) -> None:
        super().__init__(optimizer)
        self.averager = averager

    def step(self) -> Any:
        """Replaces local gradients by the mean over the workers, and updates the parameters."""
        self.averager.average_()
        return super().step()

    def communication_stats(self) -> dict[str, Any]:
        """What the averager has sent."""
        return self.averager.communication_stats()

    def state_dict(self) -> dict[str, Any]:
        """Of both: the averager has the errors."""
        return {"optimizer": super().state_dict(), "averager": self.averager.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes that up again."""
        super().load_state_dict(state_dict["optimizer"])
        self.averager.load_state_dict(state_dict["averager"])
