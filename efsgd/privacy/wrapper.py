"""An optimizer around another: groups, state, hooks and statistics are those of the inner one."""

from collections import defaultdict
from typing import Any, Never

from torch import Tensor
from torch.optim import Optimizer

from efsgd.optimizers.base import ErrorFeedbackOptimizer


class Wrapper(Optimizer):
    """What is not defined here or in a subclass is answered by the wrapped optimizer.

    Attributes:
        original_optimizer: the wrapped one, as wrappers of Opacus call it.

    Args:
        optimizer: applies gradients.
        exchanger: sends them; the same one, or a `GradientAverager`.
    """

    def __init__(self, optimizer: Optimizer, exchanger: ErrorFeedbackOptimizer) -> None:
        # Optimizer's own __init__ would make groups, state and hooks, of which there is one set.
        self.original_optimizer, self._exchanger = optimizer, exchanger

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """Those of the wrapped optimizer."""
        return self.original_optimizer.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """That of the wrapped optimizer."""
        return self.original_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of the wrapped optimizer."""
        return self.original_optimizer.defaults

    @property
    def process_group(self) -> Any:
        """The workers; see `PowerSGDOptimizer.process_group`."""
        return self._exchanger.process_group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._exchanger.process_group = group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the wrapped optimizer; an averager must be given it as well."""
        self.original_optimizer.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        # Statistics, comparisons and checkpoints are those of whoever exchanges; hooks, those of
        # whoever steps.
        if name.startswith("__") or "_exchanger" not in self.__dict__:
            raise AttributeError(name)
        found = self._exchanger if hasattr(type(self._exchanger), name) else self.original_optimizer
        return getattr(found, name)

    def __reduce__(self) -> Never:
        raise TypeError(
            f"{type(self).__name__} is neither pickled nor copied: two would draw the same noise. "
            f"Save its state_dict(), and construct another one."
        )
