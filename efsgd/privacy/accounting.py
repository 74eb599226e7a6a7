"""What has been released, and the ε that it stands for. The accountants are Opacus's."""

import functools
import math
import secrets
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal, TypeAlias

from opacus.accountants import PRVAccountant, RDPAccountant

from efsgd.checks import plain, require_choice, require_integer, require_number

Accountant: TypeAlias = Literal["prv", "rdp"]

ACCOUNTANTS = ("prv", "rdp")
#: The PRV accountant's memory grows with ε, to gigabytes; above this the bound of RDP stands in.
_MOST_FOR_PRV = 100.0
# Opacus's own orders, and larger ones: with much noise and few steps the best lies beyond 63.
# Beyond 1029 its binomials overflow.
_ORDERS = [*RDPAccountant.DEFAULT_ALPHAS, *(2**power for power in range(6, 11))]


@dataclass(frozen=True)
class Release:
    """A step of some kind.

    Attributes:
        noise: the standard deviation of each worker's noise in multiples of the clipping norm.
        world_size: the number of workers.
        sample_rate: the probability with which a record takes part in a step.
        averages: whether what is sent is only averaged: see `efsgd.Claims`.
        lineage: a random number of those who have taken it: workers that train together.
    """

    noise: float
    world_size: int
    sample_rate: float
    averages: bool
    lineage: int


class Ledger:
    """All that has been released. Nothing that was sent is forgotten, nor counted twice.

    Attributes:
        steps: the number of steps of each kind.
        lineage: of the steps to come. It ends with the optimizer: one that loads a checkpoint does
            not go on with that of the steps in it, as others may do the same.
    """

    def __init__(self) -> None:
        self.lineage, self.steps = secrets.randbits(62), Counter[Release]()
        self._last: Release | None = None

    def record(self, noise: float, world_size: int, sample_rate: float, averages: bool) -> None:
        """Adds a step."""
        self._last = Release(noise, world_size, sample_rate, averages, self.lineage)
        self.steps[self._last] += 1

    def join(self, lineage: int) -> None:
        """Other workers take the step that was recorded last as well, and those to come."""
        if lineage != self.lineage and self._last is not None:
            self.lineage, joint = lineage, replace(self._last, lineage=lineage)
            self.steps = self.steps + Counter([joint]) - Counter([self._last])
            self._last = joint

    def saved(self) -> list[tuple[Any, ...]]:
        """The fields of each release, and the number of steps, in a state_dict."""
        return [(*astuple(release), steps) for release, steps in self.steps.items()]

    def load(self, saved: Iterable[Sequence[Any]]) -> None:
        """Takes in what `saved` has returned, here or elsewhere.

        Of one lineage the larger number has been seen: the other is of a moment before, in the same
        training. Those of several lineages were all seen, and add up.
        """
        self.steps = Counter({Release(*fields): steps for *fields, steps in saved}) | self.steps


def guarantees(
    steps: Mapping[Release, int], delta: float, *, averages: bool
) -> dict[str, dict[str, float]]:
    """ε by observer and accountant; see `PrivateOptimizer.guarantees`.

    `averages` is of the steps to come.
    """
    _require_delta(delta)
    releases, multiples = list(steps), {"messages": [1.0 for _ in steps]}
    if averages and all(release.averages for release in releases):
        workers = [release.world_size for release in releases]
        multiples["sum"] = [math.sqrt(count) for count in workers]
        if all(count > 1 for count in workers):
            multiples["sum_to_worker"] = [math.sqrt(count - 1) for count in workers]
    found = {}
    for observer, own in multiples.items():
        history = [
            (release.noise * multiple, release.sample_rate, steps[release])
            for release, multiple in zip(releases, own, strict=True)
        ]
        found[observer] = {name: _epsilon(history, delta, name) for name in ACCOUNTANTS}
    return found


def epsilon(
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "prv",
) -> float:
    """The ε of steps that are yet to be taken, by the accountants of Opacus.

    Args:
        noise_multiplier: σ, the standard deviation of the noise that the observer cannot know, in
            multiples of the clipping norm; at least 0.
        sample_rate: the probability q with which a record takes part in a step, above 0 and at
            most 1 (Poisson sampling).
        steps: how many, at least 0.
        delta: δ, between 0 and 1; far less than one over the number of records.
        accountant: "prv", the tightest (Gopi et al., arXiv 2106.02848), within 0.01 of ε; or "rdp"
            (Mironov et al., arXiv 1908.10530), a little larger where there are many steps. For an ε
            above 100 both are "rdp".

    Returns:
        ε, for neighbouring data sets that differ by one record added or removed. Infinite without
        noise.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from efsgd.privacy import epsilon
        >>> round(epsilon(1.0, 64 / 60000, 28125, 1e-5, accountant="rdp"), 4)
        1.0741
        >>> round(epsilon(1.0, 64 / 60000, 28125, 1e-5), 4)
        0.8937
    """
    require_number("noise_multiplier", noise_multiplier)
    require_sample_rate(sample_rate)
    require_integer("steps", steps, 0)
    _require_delta(delta)
    require_choice("accountant", accountant, ACCOUNTANTS)
    step = plain(noise_multiplier), plain(sample_rate), plain(steps)
    return _epsilon([step], delta, accountant)


def noise_multiplier(
    epsilon: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: Accountant = "prv",
) -> float:
    """The least noise whose ε is not above a given one: the inverse of `epsilon`.

    It is searched for: with "prv" that takes seconds, for many steps a minute. Plan once, and give
    programs the number.

    Args:
        epsilon: above 0. The other arguments are those of `epsilon`.
        sample_rate: q.
        steps: at least 1.
        delta: δ.
        accountant: "prv" or "rdp".

    Returns:
        σ, with an ε that is smaller than what was asked for by at most 0.5 %.

    Raises:
        ValueError: an argument is out of range, or no noise up to 1e6 suffices.

    Example:
        >>> from efsgd.privacy import epsilon, noise_multiplier
        >>> sigma = noise_multiplier(1.0, 64 / 60000, 28125, 1e-5, accountant="rdp")
        >>> 0.995 <= epsilon(sigma, 64 / 60000, 28125, 1e-5, accountant="rdp") <= 1.0
        True
    """
    require_number("epsilon", epsilon, above=0)
    require_sample_rate(sample_rate)
    require_integer("steps", steps, 1)
    _require_delta(delta)
    require_choice("accountant", accountant, ACCOUNTANTS)
    target, rate, count = plain(epsilon), plain(sample_rate), plain(steps)

    @functools.cache
    def spent(sigma: float) -> float:
        return _epsilon([(sigma, rate, count)], delta, accountant)

    low, high = 0.0, 1.0
    while spent(high) > target:
        low, high = high, 2 * high
        if high > _MOST_NOISE:
            raise ValueError(
                f"Invalid epsilon: {epsilon!r}. Not reached with noise of {_MOST_NOISE:.0e} times "
                f"the clipping norm. Take fewer steps, or a larger epsilon or delta."
            )
    while target - spent(high) > _TOLERANCE * target and high - low > _TOLERANCE**2 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > target else (low, middle)
    return high


_MOST_NOISE, _TOLERANCE = 1e6, 0.005


def require_sample_rate(sample_rate: object, name: str = "sample_rate") -> None:
    """Raises ValueError unless it is a probability above 0; `name` is that of the argument."""
    remedy = "It is the probability with which a record takes part in a step."
    require_number(name, sample_rate, above=0, most=1, remedy=remedy)


def _require_delta(delta: object) -> None:
    remedy = "Use far less than one over the number of records, for example 1e-5."
    require_number("delta", delta, above=0, most=1 - 1e-12, remedy=remedy)


def _epsilon(history: Iterable[tuple[float, float, int]], delta: float, accountant: str) -> float:
    counted = Counter[tuple[float, float]]()  # PRV takes seconds where there are many kinds
    for noise, rate, steps in history:
        counted[noise, rate] += steps
    taken = [(noise, rate, steps) for (noise, rate), steps in counted.items() if steps > 0]
    if not taken:
        return 0.0
    if any(noise == 0.0 for noise, *_ in taken):
        return math.inf
    with warnings.catch_warnings():
        # A rate of 1 has a logarithm of 0 in it, and the best of all orders may be the last one.
        warnings.filterwarnings("ignore", "divide by zero", RuntimeWarning)
        warnings.filterwarnings("ignore", "Optimal order is the (largest|smallest) alpha")
        bound = _by(RDPAccountant(), taken, delta, alphas=_ORDERS)
        is_prv = accountant == "prv" and bound <= _MOST_FOR_PRV
        return _by(PRVAccountant(), taken, delta) if is_prv else bound


def _by(
    accountant: Any, history: list[tuple[float, float, int]], delta: float, **options: Any
) -> float:
    accountant.history = history
    return float(accountant.get_epsilon(plain(delta), **options))
