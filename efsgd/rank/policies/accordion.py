"""Accordion: little compression while gradients change, much while they do not.

Source: Agarwal, Wang, Lee, Venkataraman, Papailiopoulos: "Accordion: Adaptive Gradient
Communication via Critical Learning Regime Identification", MLSys 2021, arXiv 2010.16248,
Algorithm 1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from efsgd.checks import plain
from efsgd.compressors import Compressor
from efsgd.errors import warn_user
from efsgd.rank.accumulation import Accumulator
from efsgd.rank.approximation.sketch import mean_norms
from efsgd.rank.base import RankPolicy
from efsgd.rank.checks import require_choice, require_counts, require_numbers
from efsgd.rank.layers import Layer, Value
from efsgd.wire.collectives import Broadcast, Exchange


def is_critical(previous: float | None, present: float, threshold: float = 0.5) -> bool:
    """Whether the norm of the accumulated gradient has changed by much: a critical regime.

    That is abs(‖Δ_prev‖ - ‖Δ_curr‖) / ‖Δ_prev‖ >= η. Where there is nothing to compare with (the
    first window, or a norm that was zero), or a norm is not finite, it is critical.

    Args:
        previous: ‖Δ_prev‖; None where there is none.
        present: ‖Δ_curr‖.
        threshold: η.

    Example:
        >>> from efsgd.rank import is_critical
        >>> is_critical(2.0, 1.5), is_critical(2.0, 1.0), is_critical(2.0, 3.0)
        (False, True, True)
        >>> is_critical(None, 1.0), is_critical(0.0, 0.0)
        (True, True)
    """
    if previous is None or previous == 0.0:
        return True
    if not (math.isfinite(previous) and math.isfinite(present)):
        return True
    return abs(previous - present) / previous >= threshold


class Accordion(RankPolicy):
    """Takes a high rank in critical regimes of training and a low one in all others.

    A regime is critical where the norm of the gradient that was accumulated over a window has
    changed by `threshold` or more since the last window that was measured, and from a fall of the
    learning rate up to the next decision. The first windows are. A window ends with each call of
    `RankScheduler.step`, as a rule after an epoch; every `interval`-th is measured, and gradients
    are accumulated in those alone.

    Differences to the authors' code: the gradient is the mean over the workers, not worker 0's; a
    fall of the learning rate counts from the window that it begins with, not one later; factors
    keep what they learned.

    Args:
        low: the rank outside of critical regimes. Choose it such that training succeeds with it
            alone, if worse: see "How to choose the low rank" in the documentation.
        high: the rank in critical regimes.
        threshold: η, at least 0.
        interval: how many windows lie between two decisions, at least 1.
        scope: "layer" decides for each layer by itself, "model" for all together.
        lr_fall: the learning rate of a layer has fallen where it is less than this share of what it
            was in the last window. 1.0: any fall, as in the paper. With a rate that falls in every
            window, such as a cosine's, that would always be critical: 0.5 asks for less than half,
            and with 0.0 no fall counts.
        gradients: "mean" compares norms of the mean over the workers, "worker 0" those of its own
            gradients, as the authors' code does; that has more noise, and sends 8 bytes for each.
        sketch: with "mean", how many numbers of each layer are sent for a decision at most. The
            norms then are estimates: their standard deviation is about 1 / √(2·sketch) of them, 1 %
            for 4096. None sends whole gradients, for exact norms.
        setting: what `low` and `high` are values of: "rank", or another setting of the compressor
            that single parameters may have, such as the "density" of Top K.

    Raises:
        ValueError: an argument is no number, or out of range.

    Source: arXiv 2010.16248, Algorithm 1.
    """

    def __init__(
        self,
        low: Value,
        high: Value,
        *,
        threshold: float = 0.5,
        interval: int = 10,
        scope: str = "layer",
        lr_fall: float = 1.0,
        gradients: str = "mean",
        sketch: int | None = 4096,
        setting: str = "rank",
    ) -> None:
        require_numbers(low=low, high=high, threshold=threshold, lr_fall=lr_fall)
        require_counts(interval=interval, sketch=1 if sketch is None else sketch)
        require_choice("scope", scope, ("layer", "model"))
        require_choice("gradients", gradients, ("mean", "worker 0"))
        if low > high:
            raise ValueError(
                f"Invalid low and high: {low!r} and {high!r}. Must be in this order: low is for "
                f"windows in which little changes, and must not exceed high."
            )
        self.low, self.high, self.sketch = plain(low), plain(high), plain(sketch)
        self.threshold: float = plain(threshold)
        self.interval: int = plain(interval)
        self.lr_fall: float = plain(lr_fall)
        self.scope, self.gradients = scope, gradients
        self.setting, self.values = setting, (self.low, self.high)
        self._windows = 0  # that have ended
        self._norms: dict[int, float] = {}  # of the last window that was measured
        self._pending: dict[int, float] | None = None
        self._lrs: dict[int, float | None] = {}  # of each layer, in the window that is ending
        self._accumulator = Accumulator(with_errors=False)
        self.accumulators = (self._accumulator,)

    @property
    def _is_looking(self) -> bool:
        """Whether a decision ends the present window."""
        return self._windows % self.interval == 0

    def begin(self, layers: Sequence[Layer], compressor: Compressor) -> Mapping[int, Value]:
        """High everywhere."""
        self._windows = -1  # the first `commit` begins window 0
        self._norms, self._pending, self._lrs = {}, None, {}
        if self.lr_fall > 0 and all(layer.lr is None for layer in layers):
            warn_user(
                "Accordion knows no learning rates, so that their falls make no regime critical. "
                "Tell RankScheduler whose count, lr_of=adamw for example, or pass lr_fall=0."
            )
        return {layer.index: self.high for layer in layers}

    def propose(
        self, layers: Sequence[Layer], world_size: int, worker: int
    ) -> Exchange[Mapping[int, Value]]:
        """Low or high, by Algorithm 1."""
        proposed = {}
        self._pending = None
        if self._is_looking:
            self._pending = yield from self._measure(layers)
            for layer in layers:
                norms = self._norms.get(layer.index), self._pending.get(layer.index, math.nan)
                is_high = is_critical(*norms, self.threshold)
                proposed[layer.index] = self.high if is_high else self.low
        for layer in layers:
            before = self._lrs.get(layer.index)
            if layer.lr is not None and before is not None and layer.lr < self.lr_fall * before:
                proposed[layer.index] = self.high
        return proposed

    def _measure(self, layers: Sequence[Layer]) -> Exchange[dict[int, float]]:
        """The norms by which each layer is judged."""
        indices = [layer.index for layer in layers if layer.index in self._accumulator.sums]
        sums = [self._accumulator.sums[index] for index in indices]
        if not sums:
            return {}
        if self.gradients == "mean":
            norms = yield from mean_norms(sums, self.sketch, seed=0)
        else:
            own = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in sums]
            stacked = torch.stack([norm.to(own[0].device) for norm in own])
            norms = (yield Broadcast(stacked, "norms of accumulated gradients")).tolist()
        if self.scope == "model":
            norms = [math.hypot(*norms)] * len(norms)
        return dict(zip(indices, norms, strict=True))

    def commit(self, layers: Sequence[Layer]) -> None:
        """Keeps norms and learning rates, and accumulates anew if the next window counts."""
        self._lrs = {layer.index: layer.lr for layer in layers}
        self._windows += 1
        self._accumulator.begin(layers if self._is_looking else ())
        if self._pending is not None:
            self._norms, self._pending = self._pending, None

    def state_dict(self) -> dict[str, Any]:
        """Norms, learning rates, and the number of windows."""
        return {"windows": self._windows, "norms": dict(self._norms), "lrs": dict(self._lrs)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores it."""
        self._windows = state_dict["windows"]
        self._norms, self._lrs = dict(state_dict["norms"]), dict(state_dict["lrs"])
