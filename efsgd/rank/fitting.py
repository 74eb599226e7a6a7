"""Which values fit into a budget of bytes, or into a part of a step's time."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from efsgd.compressors import Compressor
from efsgd.rank.base import Layer, Value
from efsgd.rank.costs.network import Network
from efsgd.rank.costs.volumes import byte_table, total_bytes
from efsgd.rank.fixed_traffic import Background


def largest_within(
    values: Sequence[Value],
    table: Sequence[Sequence[float]],
    total: Callable[[Sequence[Value]], float],
    limit: float,
) -> list[Value] | None:
    """Chooses a value for each layer.

    The last of `values` whose total is within the limit, for all alike. Then single layers get the
    next value that costs them anything else, in order of what it costs more, the first of equals
    first, while the limit lasts.

    Args:
        values: in order of ascending cost.
        table: what each value costs each layer, a row for each.
        total: what chosen values cost together: about the sum of the table's.
        limit: of the total.

    Returns:
        By layer; None where not one value is within the limit for all.

    Example:
        >>> from efsgd.rank.fitting import largest_within
        >>> table = [[1, 2, 3], [10, 20, 30]]
        >>> def total(chosen):
        ...     return sum(row[value - 1] for row, value in zip(table, chosen))
        >>> largest_within([1, 2, 3], table, total, limit=23), total([3, 2])
        ([3, 2], 23)
    """
    last_first = range(len(values) - 1, -1, -1)
    uniform = next((k for k in last_first if total([values[k]] * len(table)) <= limit), None)
    if uniform is None:
        return None
    raises = sorted(_raises(table, uniform))

    def with_first(count: int) -> list[Value]:
        chosen = [values[uniform]] * len(table)
        for _, layer, k in raises[:count]:
            chosen[layer] = values[k]
        return chosen

    counts = range(len(raises) + 1)
    return with_first(bisect_right(counts, limit, key=lambda n: total(with_first(n))) - 1)


def _raises(table: Sequence[Sequence[float]], uniform: int) -> list[tuple[float, int, int]]:
    """What the next value costs more, of which layer, and which value it is."""
    found = []
    for layer, row in enumerate(table):
        for k in range(uniform + 1, len(row)):
            if row[k] != row[uniform]:
                found.append((row[k] - row[uniform], layer, k))
                break
    return found


@dataclass(frozen=True)
class Fit:
    """What fits.

    Attributes:
        values: by the layers' indices; None where not even the smallest fits.
        least: what a step costs with the smallest value everywhere.
    """

    values: Mapping[int, Value] | None
    least: float


@dataclass(frozen=True)
class Fitting:
    """Layers and values between which to choose.

    Attributes:
        compressor: of the optimizer.
        layers: those whose values make a difference.
        setting: what is decided on.
        values: of it, in order of ascending cost.
        background: what is sent besides.
    """

    compressor: Compressor
    layers: Sequence[Layer]
    setting: str
    values: Sequence[Value]
    background: Background

    def within_bytes(self, budget: float) -> Fit:
        """The largest values with which one worker sends so many bytes in a step, or fewer."""
        fitting = largest_within(self.values, self._table(), self._bytes, budget)
        return self._fit(fitting, self._bytes)

    def within_share(self, network: Network, step_seconds: float, share: float) -> Fit:
        """The largest values with which communication takes this share of a step's time, or less.

        Args:
            network: by whose model communication takes time.
            step_seconds: of a step with the layers' present values. What is not communication stays
                as it is.
            share: above 0 and below 1.

        Returns:
            `least` is a share, too.
        """

        def seconds(chosen: Sequence[Value]) -> float:
            nbytes = self._bytes(chosen, as_all_reduce=True)
            return network.seconds(nbytes, self.background.collectives)

        others = max(0.0, step_seconds - seconds([layer.value for layer in self.layers]))
        table = [
            [network.seconds(nbytes, 0) for nbytes in row]
            for row in self._table(as_all_reduce=True)
        ]
        limit = others * share / (1 - share)

        def shares(chosen: Sequence[Value]) -> float:
            own = seconds(chosen)
            return own / (own + others) if own else 0.0

        return self._fit(largest_within(self.values, table, seconds, limit), shares)

    def _fit(self, chosen: Sequence[Value] | None, cost: Callable[[Sequence[Value]], float]) -> Fit:
        least = cost([self.values[0]] * len(self.layers))
        if chosen is None:
            return Fit(None, least)
        pairs = zip(self.layers, chosen, strict=True)
        return Fit({layer.index: value for layer, value in pairs}, least)

    def _table(self, *, as_all_reduce: bool = False) -> list[list[float]]:
        workers = self.background.world_size
        own = self.compressor, self.layers, self.setting, self.values, workers
        return byte_table(*own, as_all_reduce=as_all_reduce)

    def _bytes(self, chosen: Sequence[Value], *, as_all_reduce: bool = False) -> float:
        workers = self.background.world_size
        own = self.compressor, self.layers, self.setting, chosen, workers
        return self.background.nbytes + total_bytes(*own, as_all_reduce=as_all_reduce)
