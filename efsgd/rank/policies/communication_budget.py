"""Values as large as communication may cost: bytes of a step, or a part of its time."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from efsgd.checks import is_number, plain
from efsgd.compressors import Compressor
from efsgd.errors import warn_user
from efsgd.rank.base import RankPolicy
from efsgd.rank.checks import require_counts
from efsgd.rank.costs.network import Network, measure_network
from efsgd.rank.costs.volumes import byte_table, total_bytes
from efsgd.rank.fitting import largest_within
from efsgd.rank.layers import Layer, Value
from efsgd.wire.collectives import AllReduceMean, Exchange
from efsgd.wire.measuring import Clock

_STEPS_KEPT = 1000  # the last ones of a window, whose median counts


class CommunicationBudget(RankPolicy):
    """The largest rank whose communication stays within a budget.

    It is the largest of `values` that all layers can have, and then the next one for single layers,
    those first that it costs least, while the budget lasts.

    With `bytes_per_step` all is known beforehand, and training begins with these values. What
    counts is what one worker hands to collectives in an ordinary step: uncompressed parameters and
    control words, too. Steps before compression starts, refreshes of PowerSGD+, comparisons of
    workers and decisions come on top. Where steps take turns, as with `alternating`, it is the mean
    of two.

    With `share_of_step` the optimizer keeps its own values in the first window. Then network and
    steps are measured: communication by the model of `Network`, all else of a step's time as it was
    in the median. The values are such that communication takes this part of both together.

    Args:
        bytes_per_step: the budget in bytes; or
        share_of_step: in time, above 0 and below 1.
        max_rank: the largest rank that is considered.
        values: all that are considered, in order of ascending cost; by default the ranks from 1 to
            `max_rank`.
        setting: what they are values of.
        interval: how many windows lie from one measurement to the next. A budget in bytes is looked
            at in each, which sends nothing.
        clock: tells the seconds; for tests.

    Attributes:
        network: that was measured last; None before. The same on every worker.
        step_seconds: of the last window that was measured, the mean over the workers; None before.

    Raises:
        ValueError: an argument is out of range, or not exactly one budget is given. From
            `RankScheduler`: the budget is too small for the smallest value.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.rank import CommunicationBudget, RankScheduler
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1, momentum_form="sgd")
        >>> scheduler = RankScheduler(optimizer, CommunicationBudget(bytes_per_step=3000))
        >>> scheduler.get_last_ranks()  # 4·7·(64 + 32) bytes, and 4·(32 + 2 + 1)
        {'parameter 0': 7}
    """

    _compressor: Compressor  # known from `begin` on

    def __init__(
        self,
        *,
        bytes_per_step: int | None = None,
        share_of_step: float | None = None,
        max_rank: int = 64,
        values: Sequence[Value] | None = None,
        setting: str = "rank",
        interval: int = 10,
        clock: Clock = time.perf_counter,
    ) -> None:
        if (bytes_per_step is None) == (share_of_step is None):
            raise ValueError(
                f"Invalid bytes_per_step and share_of_step: {bytes_per_step!r} and "
                f"{share_of_step!r}. Must be one of them, not both and not none."
            )
        if share_of_step is None and not _is_between(0, bytes_per_step, math.inf):
            raise ValueError(
                f"Invalid bytes_per_step: {bytes_per_step!r}. Must be a number of bytes above 0."
            )
        if bytes_per_step is None and not _is_between(0, share_of_step, 1):
            raise ValueError(
                f"Invalid share_of_step: {share_of_step!r}. Must be a number above 0 and below 1."
            )
        require_counts(max_rank=max_rank, interval=interval)
        if values is None and setting != "rank":
            raise ValueError(
                f"Invalid values: None. Must be a list of values of {setting!r}, in order of "
                f"ascending cost; by itself only ranks are known, from 1 to max_rank."
            )
        own = tuple(range(1, plain(max_rank) + 1) if values is None else map(plain, values))
        are_numbers = all(_is_between(-math.inf, value, math.inf) for value in own)
        if not own or len(set(own)) < len(own) or not are_numbers:
            raise ValueError(
                f"Invalid values: {values!r}. Must be one or more numbers, each once, in order of "
                f"ascending cost."
            )
        self.bytes_per_step, self.share_of_step = plain(bytes_per_step), plain(share_of_step)
        self.setting, self.values, self._clock = setting, own, clock
        self.interval = plain(interval)
        self.network: Network | None = None
        self.step_seconds: float | None = None
        self._is_time = bytes_per_step is None
        self._pending: tuple[Network, float] | None = None
        self._windows = 0  # that have ended
        self._last: float | None = None  # when the last step was seen
        self._durations: deque[float] = deque(maxlen=_STEPS_KEPT)
        self._has_warned = False

    def begin(self, layers: Sequence[Layer], compressor: Compressor) -> Mapping[int, Value]:
        """With a budget in bytes, what fits into it; else the optimizer's own values stay."""
        self._compressor = compressor
        self._windows = -1  # the first `commit` begins window 0
        first, last = (
            total_bytes(compressor, layers, self.setting, [value] * len(layers))
            for value in (self.values[0], self.values[-1])
        )
        if first > last:
            raise ValueError(
                f"Invalid values: {self.values!r}. Must be in order of ascending cost, and the "
                f"first sends {first} bytes of the layers, the last {last}."
            )
        if self.bytes_per_step is None:
            return {}
        fitting, least = self._fit(self._free(layers), self.bytes_per_step)
        if fitting is None:
            raise ValueError(
                f"Invalid bytes_per_step: {self.bytes_per_step!r}. With {self.setting}="
                f"{self.values[0]!r} a step sends {least} bytes, {self.background.nbytes} of them "
                f"in parameters that are never compressed and in control words. Must be at least "
                f"{least}; or give smaller values."
            )
        return fitting

    def count_step(self) -> None:
        """Takes the time since the last step of the window."""
        super().count_step()
        now = self._clock()
        if self._last is not None:
            self._durations.append(now - self._last)
        self._last = now

    def propose(
        self, layers: Sequence[Layer], world_size: int, worker: int
    ) -> Exchange[Mapping[int, Value]]:
        """What fits into the budget; the smallest value, and once a warning, where nothing does."""
        self._pending, free = None, self._free(layers)
        if self.bytes_per_step is not None:
            fitting, least = self._fit(free, self.bytes_per_step)
            what = f"{least} bytes in a step, more than bytes_per_step={self.bytes_per_step!r}"
        else:
            is_time = self._windows % self.interval == 0
            measured = (yield from self._measure(layers[0].device, world_size)) if is_time else None
            if measured is None or self.share_of_step is None:
                return {}
            self._pending = network, step_seconds = measured
            seconds = partial(network.seconds, collectives=self.background.collectives)
            present = seconds(self._bytes(free, [layer.value for layer in free]))
            others = max(0.0, step_seconds - present)  # what is not communication stays as it is
            limit = others * self.share_of_step / (1 - self.share_of_step)
            fitting, least = self._fit(free, limit, seconds)
            share = least / (least + others) if least else 0.0
            what = f"{share:.0%} of the time, more than share_of_step={self.share_of_step!r}"
        if fitting is not None:
            return fitting
        if not self._has_warned:
            self._has_warned = True
            warn_user(
                f"With {self.setting}={self.values[0]!r} communication takes {what}. That is the "
                f"smallest value there is, and is taken. Raise the budget, or give smaller values."
            )
        return {layer.index: self.values[0] for layer in layers}

    def commit(self, layers: Sequence[Layer]) -> None:
        """Keeps what was measured; the time of a window's first step is not known."""
        if self._pending is not None:
            (self.network, self.step_seconds), self._pending = self._pending, None
        self._begin(self._windows + 1)

    def state_dict(self) -> dict[str, Any]:
        """The number of windows. Times of steps are not saved."""
        return {"windows": self._windows}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the number of windows."""
        self._begin(state_dict["windows"])

    def _begin(self, window: int) -> None:
        self._windows, self._last = window, None
        self._durations.clear()

    def _measure(
        self, device: torch.device, world_size: int
    ) -> Exchange[tuple[Network, float] | None]:
        """The network and the seconds of a step; None where some worker has timed none."""
        network = yield from measure_network(device, world_size, clock=self._clock)
        seconds = statistics.median(self._durations) if self._durations else math.nan
        own = torch.tensor([seconds], dtype=torch.float64, device=device)
        mean = (yield AllReduceMean(own, "seconds of a step")).item()
        return None if math.isnan(mean) else (network, mean)

    def _free(self, layers: Sequence[Layer]) -> list[Layer]:
        return [layer for layer in layers if layer.index not in self.background.fixed]

    def _fit(
        self,
        layers: Sequence[Layer],
        limit: float,
        cost: Callable[[float], float] = lambda nbytes: nbytes,
    ) -> tuple[Mapping[int, Value] | None, float]:
        """The largest values whose bytes cost no more, by index, and the least cost there is."""
        options = self.setting, self.values, self.background.world_size
        table = byte_table(self._compressor, layers, *options, as_all_reduce=self._is_time)
        chosen = largest_within(
            self.values, table, lambda values: cost(self._bytes(layers, values)), limit
        )
        least = cost(self._bytes(layers, [self.values[0]] * len(layers)))
        if chosen is None:
            return None, least
        return {layer.index: value for layer, value in zip(layers, chosen, strict=True)}, least

    def _bytes(self, layers: Sequence[Layer], chosen: Sequence[Value]) -> float:
        """Of a step; in a budget of time, as many as an all-reduce would send."""
        options = self.setting, chosen, self.background.world_size
        own = total_bytes(self._compressor, layers, *options, as_all_reduce=self._is_time)
        return self.background.nbytes + own


def _is_between(lower: float, value: object, upper: float) -> bool:
    return is_number(value) and lower < value < upper  # type: ignore[operator]
