"""An attacker who knows all but whether one record was there, and sees messages of one step.

The best test of two Gaussians of equal variance is linear, and its area under the curve is
Φ(‖Δ‖/(√2 σ)): Φ(1/(√2 σ)) where the record's gradient has the clipping norm, and nobody's noise is
known.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from efsgd.privacy import PrivateOptimizer
from efsgd.privacy.noise import NoiseSource
from tests.privacy.teams import (
    Make,
    Records,
    flat,
    made_records,
    power_sgd,
    private_team,
    step_with,
    uncompressed,
)
from tests.simulation import parameters_of

SIGMA, DRAWS, WORKERS = 1.0, 1000, 2
SHAPE = (4, 3)
BOUND = float(stats.norm.cdf(1 / (math.sqrt(2) * SIGMA)))
#: Of an area under the curve of 2 x 1,000 draws: its standard deviation is at most
#: √(A(1-A)/1000) ≤ 0.0135 (van Dantzig's bound); 6.2 of them are exceeded once in 1e9 runs.
MARGIN = 6.2 * math.sqrt(BOUND * (1 - BOUND) / DRAWS)

#: What the attacker makes of the messages of each worker and the noisy gradients of none.
View: Any = Callable[[list[Tensor]], Tensor]


def neighbours() -> tuple[Records, Records]:
    """The same records, and one more on worker 1, whose gradient is of the clipping norm."""
    without = made_records([SHAPE], [2, 2])
    target = torch.zeros(1, *SHAPE, dtype=torch.float64)
    target[0, 0, 0] = 100.0
    return without, [without[0], [torch.cat([without[1][0], target])]]


def fresh_start(team: Sequence[PrivateOptimizer]) -> Callable[[], None]:
    """Undoes steps: errors, factors and parameters are again those of now."""
    kept = [
        (tensor, tensor.detach().clone())
        for optimizer in team
        for p in parameters_of(optimizer)
        for tensor in (p, *(v for v in optimizer.state[p].values() if isinstance(v, Tensor)))
    ]

    def undo() -> None:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)

    return undo


def scores(make: Make, view: View, records: Records, direction: Tensor) -> Tensor:
    """Of so many draws of one step: each the attacker's view, along a direction."""
    team = private_team(WORKERS, make, [torch.zeros(SHAPE, dtype=torch.float64)],
                        noise_multiplier=SIGMA)  # fmt: skip
    step_with(team, made_records([SHAPE], [0, 0]))  # workers agree once
    found = []
    undo: Callable[[], None] | None = None
    for _ in range(DRAWS):
        if undo is not None:
            undo()
        undo = fresh_start(team)
        messages = [flat(own) for own in step_with(team, records)]
        found.append(view(messages))
    return torch.stack(found) @ direction


def area(negative: Tensor, positive: Tensor) -> float:
    """Under the curve: how often a positive is above a negative, by ranks."""
    order = torch.cat([negative, positive]).argsort().argsort().double() + 1
    n = len(positive)
    return float(order[len(negative) :].sum() - n * (n + 1) / 2) / (n * len(negative))


def of_worker_1(messages: list[Tensor]) -> Tensor:
    return messages[1][-12:]


def difference(messages: list[Tensor]) -> Tensor:
    return messages[1][-12:] - messages[0][-12:]


def first_of(size: int) -> Tensor:
    """Where the record's gradient is."""
    direction = torch.zeros(size, dtype=torch.float64)
    direction[0] = 1.0
    return direction


def measured(make: Make, view: View, direction: Tensor) -> float:
    without, with_target = neighbours()
    return area(*(scores(make, view, own, direction) for own in (without, with_target)))


def test_messages_without_compression() -> None:
    """Neither more than the guarantee allows, nor less: the attack is the best there is."""
    found = measured(uncompressed, of_worker_1, first_of(12))
    assert abs(found - BOUND) < MARGIN


def test_differences_of_messages() -> None:
    """The other worker's noise is on top: Φ(1/2)."""
    found = measured(uncompressed, difference, first_of(12))
    assert abs(found - float(stats.norm.cdf(0.5 / SIGMA))) < MARGIN


def test_messages_of_powersgd() -> None:
    """P is a projection of what is protected, and the attacker knows onto what: Q."""

    def first_rows(messages: list[Tensor]) -> Tensor:
        return messages[1][-4 - 3 : -3]  # P, before Q

    # The sign of Q is the attacker's to know; the better of both is above chance.
    found = measured(power_sgd, first_rows, first_of(4))
    assert 0.5 - MARGIN < max(found, 1 - found) < BOUND + MARGIN


# ---- broken on purpose --------------------------------------------------------------------------


def test_noise_of_worker_0_alone_protects_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where an all-reduce is followed by noise of the first worker."""
    add, drawn = NoiseSource.add_, []

    def of_the_first(self: NoiseSource, tensor: Tensor, deviation: float) -> None:
        drawn.append(self)
        if self is drawn[0]:
            add(self, tensor, deviation)

    monkeypatch.setattr(NoiseSource, "add_", of_the_first)
    drawn.clear()
    without, with_target = neighbours()
    first = scores(uncompressed, of_worker_1, without, first_of(12))
    drawn.clear()
    second = scores(uncompressed, of_worker_1, with_target, first_of(12))
    assert area(first, second) > BOUND + 2 * MARGIN
    assert area(first, second) == 1.0


def test_equal_noise_cancels_in_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is refused; here the comparison is left out."""

    def without_comparison(*_: object) -> Any:
        return
        yield

    monkeypatch.setattr("efsgd.privacy.optimizer.require_different", without_comparison)
    equal = iter(range(1000))

    def same(self: NoiseSource, device: object) -> torch.Generator:
        if not hasattr(self, "made"):
            self.made = torch.Generator().manual_seed(next(equal) // WORKERS)  # type: ignore[attr-defined]
        return self.made  # type: ignore[attr-defined, no-any-return]

    monkeypatch.setattr(NoiseSource, "_of", same)
    assert measured(uncompressed, difference, first_of(12)) > BOUND + 2 * MARGIN
