"""What holds for the wrapped optimizer and its averager as well, whoever calls them."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch.optim import Optimizer

from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.privacy.accounting import Ledger
from efsgd.privacy.requirements import require_no_errors


class Protection:
    """Hooks: what is saved says what was released, and nothing without noise is loaded or applied.

    Args:
        optimizer: applies gradients.
        exchanger: sends them; the same one, or a `GradientAverager`.
        ledger: of what was released.
    """

    def __init__(
        self, optimizer: Optimizer, exchanger: ErrorFeedbackOptimizer, ledger: Ledger
    ) -> None:
        self._exchanger, self._ledger, self._is_stepping = exchanger, ledger, False
        self._loaded: Sequence[Any] = ()
        for own in {optimizer, exchanger}:
            own.register_state_dict_post_hook(self._mark)
            own.register_load_state_dict_pre_hook(self._require_private)
            own.register_load_state_dict_post_hook(self._count_loaded)
        if optimizer is not exchanger:
            optimizer.register_step_pre_hook(self._require_stepping)

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Within it the wrapped optimizer may step: its gradients are averages of noisy ones."""
        self._is_stepping = True
        try:
            yield
        finally:
            self._is_stepping = False

    def _require_stepping(self, optimizer: Optimizer, *_: object) -> None:
        if not self._is_stepping:
            raise RuntimeError(
                f"This {type(optimizer).__name__} belongs to a PrivateOptimizer, and would apply "
                f"gradients without noise. Call step() of the PrivateOptimizer."
            )

    def _mark(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        state_dict["privacy"] = {"releases": self._ledger.saved()}

    def _require_private(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        if "privacy" not in state_dict and optimizer is self._exchanger:
            why = "is given errors of training without noise"
            require_no_errors(state_dict.get("state"), self._exchanger, why)
        self._loaded = state_dict.get("privacy", {"releases": ()})["releases"]

    def _count_loaded(self, _: Optimizer) -> None:
        self._ledger.load(self._loaded)
        self._loaded = ()
