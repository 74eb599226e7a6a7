"""Compressed gradients for any optimizer: the averaging part of error-feedback SGD by itself."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Never

import torch
from torch.optim.optimizer import ParamsT

from efsgd.algorithms.interfaces import Compressor, copy_
from efsgd.compressors import PowerSGD
from efsgd.engine.parameters import list_parameters
from efsgd.engine.update import Rule, Rules
from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.optimizers.settings import BOOKKEEPING
from efsgd.wire.collectives import Exchange
from efsgd.wire.transports import Workers


def _rules_of(groups: Iterable[Mapping[str, Any]]) -> Rules:
    rules = {}
    for group in groups:
        options = {} if group["max_grad_norm"] is None else {"clip": 1.0}
        rules[id(group)] = Rule(copy_, options, keeps_momentum=False, writes_gradients=True)
    return rules


class GradientAverager(ErrorFeedbackOptimizer):
    """Replaces each worker's gradients by their mean Δ', compressed, with error feedback.

    For AdamW, Muon, or any other optimizer, which then sees the same gradients on every worker:
    Algorithm 2 of PowerSGD, lines 7 to 11. It behaves like an optimizer whose parameters are the
    gradients: groups, `state_dict()`, `load_state_dict()`, hooks.

    The other arguments are those of `PowerSGDOptimizer`.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups, for example the
            `param_groups` of the other optimizer; `rank`, `min_compression_rate` and `batch_dims`
            may be set per group.
        compressor: what is sent; None is `PowerSGD()`.
        nonfinite: what all workers do when any of them has a NaN or infinite gradient: "raise"
            a `NonFiniteGradientError`, or "skip": leave the gradients as they are and return False.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from efsgd import GradientAverager, PowerSGD
        >>> model = torch.nn.Linear(64, 32)
        >>> adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> averager = GradientAverager(model.parameters(), compressor=PowerSGD(rank=2))
        >>> model(torch.ones(8, 64)).square().mean().backward()
        >>> averager.average_()
        True
        >>> adamw.step()

    Source: Vogels, Karimireddy, Jaggi, NeurIPS 2019, arXiv 1905.13727.
    """

    _rules = staticmethod(_rules_of)
    _step_name = "average_()"

    def __init__(
        self,
        params: ParamsT,
        compressor: Compressor | None = None,
        *,
        error_feedback: bool = True,
        start_compressing_at: int = 0,
        nonfinite: str = "raise",
        max_grad_norm: float | None = None,
        check_every: int = 0,
        bucket_bytes: int | None = None,
        process_group: Workers = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "error_feedback": error_feedback,
            "start_compressing_at": start_compressing_at,
            "nonfinite": nonfinite,
            "max_grad_norm": max_grad_norm,
            "check_every": check_every,
            "bucket_bytes": bucket_bytes,
        }
        compressor = PowerSGD() if compressor is None else compressor
        super().__init__(params, defaults, compressor, process_group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group, of which it keeps a copy; see `ErrorFeedbackOptimizer`.

        Args:
            param_group: may belong to another optimizer: nothing is written into it, and of its
                settings only those are taken that an averager has.
        """
        if isinstance(param_group, dict):
            known = {"params", "param_names", *self.defaults}.difference(BOOKKEEPING)
            param_group = {name: param_group[name] for name in param_group if name in known}
        super().add_param_group(param_group)

    def average_(self, scaler: torch.amp.GradScaler | None = None) -> bool:
        """Writes Δ' to each `p.grad`, the same on every worker.

        Every worker of the group must call it, the same number of times, after the backward pass
        and before anything that looks at gradients (clipping, `scaler.unscale_`). A parameter
        that no worker has a gradient for keeps None; one that only others have gets theirs.

        Args:
            scaler: of the loss, in mixed precision. Errors are kept in units of the loss whatever
                its scale. If any worker's gradients have overflowed then all workers' become
                infinite, so that each worker's scaler skips its step.

        Returns:
            Whether gradients were averaged; if not (see `nonfinite`, `scaler`), on no worker.

        Raises:
            NonFiniteGradientError: some worker's gradient is NaN or infinite; nothing has changed.
            RuntimeError: the scaler has unscaled gradients already.
            WorkerMismatchError: the workers do not train the same thing; nothing has changed.
            CollectiveError: a collective failed; nothing has changed on this worker.
        """
        is_scaled = scaler is not None and scaler.is_enabled()
        if is_scaled:
            _require_scaled(scaler, self)
        self._scale = scaler.get_scale() if scaler is not None and is_scaled else None
        try:
            return bool(self.step())
        finally:
            self._scale = None

    def join_hook(self, **options: Any) -> Never:
        """Raises.

        Raises:
            NotImplementedError: a worker that has joined would not take the steps of the optimizer
                that the gradients are for.
        """
        raise NotImplementedError(
            "A worker that has joined would average gradients, but not step the optimizer that "
            "they are for. Without Join, let every worker take the same number of steps: "
            "average_() takes part without gradients, too, and gives all workers the mean."
        )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """`average_`, under the name that hooks and frameworks know; returns what it returns.

        Args:
            closure: computes gradients; called first.
        """
        if closure is not None:
            self._evaluate(closure)
        return self._take_step()

    def exchange(self, world_size: int = 1, worker: int = 0) -> Exchange[bool]:
        """`average_` as an exchange, for any driver; see `ErrorFeedbackOptimizer.exchange`."""
        applied = yield from super().exchange(world_size, worker)
        if self._scale is not None:
            trained = [info for info in list_parameters(self.param_groups) if info.is_trained]
            for parameter in (i.parameter for i in trained if i.gradient is not None):
                if applied and parameter.grad is not None:
                    parameter.grad.mul_(self._scale)
                else:
                    parameter.grad = torch.full_like(parameter, torch.inf, requires_grad=False)
        return applied


def _require_scaled(scaler: object, averager: object) -> None:
    """Raises where gradients are unscaled that no other averager has seen in this iteration."""
    states = getattr(scaler, "_per_optimizer_states", {})  # another dict after scaler.update()
    # A scaler does not tell whose gradients it has unscaled. Noted beside them is who has averaged.
    note: dict[str, Any] = {"stage": None, "found_inf_per_device": {}, "averagers": set()}
    known = states.setdefault(id(GradientAverager), note)["averagers"]
    for state in states.values() if known <= {id(averager)} else ():
        if getattr(state.get("stage"), "name", None) == "UNSCALED":
            raise RuntimeError(
                "average_(scaler) after scaler.unscale_(optimizer): the gradients are unscaled "
                "already and would be divided by the scale again. Call average_(scaler) first."
            )
    known.add(id(averager))
