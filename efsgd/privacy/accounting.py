"""What has been released, and the ε that it stands for. The accountants are Opacus's."""

import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
    """Steps of one kind.

    Attributes:
        noise: the standard deviation of each worker's noise in multiples of the clipping norm.
        world_size: the number of workers.
        sample_rate: the probability with which a record takes part in a step.
        averages: whether what is sent is only averaged: see `efsgd.Claims`.
        steps: how many.
    """

    noise: float
    world_size: int
    sample_rate: float
    averages: bool
    steps: int = 1


def record(releases: list[Release], step: Release) -> None:
    """Adds a step to those before it (in place)."""
    if releases and replace(releases[-1], steps=1) == step:
        releases[-1] = replace(step, steps=releases[-1].steps + 1)
    else:
        releases.append(step)


def restored(own: Sequence[Release], loaded: Sequence[Release]) -> list[Release]:
    """What has been released once a checkpoint is loaded: nothing that was sent is forgotten.

    What an optimizer has released is kept where it goes back to an earlier checkpoint of its own.
    """
    before = [step for release in own for step in _single_steps(release)]
    saved = [step for release in loaded for step in _single_steps(release)]
    goes_back = before[: len(saved)] == saved
    return list(own) if goes_back else [*loaded, *own]


def _single_steps(release: Release) -> list[Release]:
    return [replace(release, steps=1)] * release.steps


def guarantees(
    releases: Sequence[Release], delta: float, *, averages: bool
) -> dict[str, dict[str, float]]:
    """ε by observer and accountant; see `PrivateOptimizer.guarantees`.

    `averages` is of the steps to come.
    """
    _require_delta(delta)
    multiples = {"messages": [1.0 for _ in releases]}
    if averages and all(release.averages for release in releases):
        workers = [release.world_size for release in releases]
        multiples["sum"] = [math.sqrt(count) for count in workers]
        if all(count > 1 for count in workers):
            multiples["sum_to_worker"] = [math.sqrt(count - 1) for count in workers]
    found = {}
    for observer, own in multiples.items():
        history = [
            (release.noise * multiple, release.sample_rate, release.steps)
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


def require_sample_rate(sample_rate: object) -> None:
    """Raises ValueError unless it is a probability above 0."""
    remedy = "It is the probability with which a record takes part in a step."
    require_number("sample_rate", sample_rate, above=0, most=1, remedy=remedy)


def _require_delta(delta: object) -> None:
    remedy = "Use far less than one over the number of records, for example 1e-5."
    require_number("delta", delta, above=0, most=1 - 1e-12, remedy=remedy)


def _epsilon(history: Iterable[tuple[float, float, int]], delta: float, accountant: str) -> float:
    taken = [each for each in history if each[2] > 0]
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
