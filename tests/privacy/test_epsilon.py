"""ε: published and independent figures beside those of `efsgd.privacy.epsilon`."""

import math
from typing import Any

import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant, RDPAccountant

from efsgd.privacy import epsilon, noise_multiplier

#: A run on MNIST: batches of 64, 30 epochs.
RATE, STEPS, DELTA = 64 / 60000, 28125, 1e-5
#: Whole orders that Opacus computes: its own have no 11, and binomials overflow beyond 1029.
ORDERS = [*range(2, 11), *range(12, 64), *(2**power for power in range(6, 11))]


def naive(sigma: float, rate: float, steps: int, delta: float) -> tuple[float, int]:
    """ε and its order α, of whole orders: Mironov et al., arXiv 1908.10530, section 3.3."""

    def moment(alpha: int) -> float:
        terms = [
            math.lgamma(alpha + 1) - math.lgamma(k + 1) - math.lgamma(alpha - k + 1)
            + k * math.log(rate) + k * (k - 1) / (2 * sigma**2)
            + ((alpha - k) * math.log1p(-rate) if k < alpha else 0)
            for k in range(alpha + 1)
        ]  # fmt: skip
        most = max(terms)
        return (most + math.log(sum(math.exp(t - most) for t in terms))) / (alpha - 1)

    def converted(alpha: int) -> float:
        spent = steps * moment(alpha) + math.log((alpha - 1) / alpha)
        return spent - (math.log(delta) + math.log(alpha)) / (alpha - 1)

    return min((converted(alpha), alpha) for alpha in ORDERS)


@pytest.mark.parametrize(
    ("sigma", "whole_orders", "rdp", "prv", "pld"),
    [
        (1.0, 1.07406, 1.07406, 0.8937, 0.8840),
        (2**-0.5, 2.556, 2.548, 2.002, 1.992),
        (0.5, 10.148, 9.115, 7.804, None),
        (2**0.5, 0.5667, 0.5667, 0.5226, 0.5132),
    ],
)
def test_a_table_of_epsilon(
    sigma: float, whole_orders: float, rdp: float, prv: float, pld: float | None
) -> None:
    """To as many digits as the table has; PRV is above the truth, by at most its 0.01."""
    found_rdp = epsilon(sigma, RATE, STEPS, DELTA, accountant="rdp")
    found_prv = epsilon(sigma, RATE, STEPS, DELTA)
    assert found_rdp == pytest.approx(rdp, abs=5e-4 if rdp > 2 else 5e-5)
    assert found_prv == pytest.approx(prv, abs=5e-4 if prv > 2 else 5e-5)
    checked, order = naive(sigma, RATE, STEPS, DELTA)
    assert checked == pytest.approx(whole_orders, abs=5e-4 if checked > 2 else 5e-5)
    assert found_rdp <= checked + 1e-6  # Opacus has fractions among its orders, too
    if sigma == 1.0:
        assert order == 12
    event = SelfComposedDpEvent(PoissonSampledDpEvent(RATE, GaussianDpEvent(sigma)), STEPS)
    other = RdpAccountant().compose(event).get_epsilon(DELTA)
    assert other == pytest.approx(found_rdp, rel=2e-3)  # of other fractions
    if pld is not None:
        tight = PLDAccountant().compose(event).get_epsilon(DELTA)
        assert tight == pytest.approx(pld, abs=5e-4 if pld > 1.5 else 5e-5)
        assert tight - 1e-3 <= found_prv <= tight + 0.011


@pytest.mark.parametrize("steps", [1, 40, 3000])
@pytest.mark.parametrize("rate", [0.001, 0.05, 0.6])
@pytest.mark.parametrize("sigma", [0.9, 3.0, 20.0])
def test_renyi_epsilon_is_that_of_a_naive_reference(sigma: float, rate: float, steps: int) -> None:
    """Equal, but below order 12, where fractions of orders may gain something."""
    found = epsilon(sigma, rate, steps, 1e-6, accountant="rdp")
    checked, order = naive(sigma, rate, steps, 1e-6)
    least = 1.0 if order >= 12 else 0.4
    assert least - 1e-9 < found / checked < 1 + 1e-9  # rounding of sums of logarithms


def test_the_accountants_are_those_of_opacus() -> None:
    for name, accountant in (("prv", PRVAccountant()), ("rdp", RDPAccountant())):
        accountant.history = [(1.1, 0.02, 300)]
        found = epsilon(1.1, 0.02, 300, 1e-5, accountant=name)  # type: ignore[arg-type]
        assert found == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-12)


def test_a_single_release_is_a_gaussian_mechanism() -> None:
    """σ = √(2 ln(1.25/δ))/ε is sufficient, for ε up to 1: what is found must be below that."""
    sigma = math.sqrt(2 * math.log(1.25 / 1e-5))
    assert sigma == pytest.approx(4.845, abs=1e-3)
    for name in ("prv", "rdp"):
        assert 0.7 < epsilon(sigma, 1.0, 1, 1e-5, accountant=name) <= 1.0  # type: ignore[arg-type]


def test_epsilon_at_the_edges() -> None:
    assert epsilon(1.0, 0.1, 0, 1e-5) == 0.0
    assert epsilon(0.0, 0.1, 0, 1e-5) == 0.0
    assert epsilon(0.0, 0.1, 1, 1e-5) == math.inf
    # Where PRV would take gigabytes the bound of RDP stands in.
    assert epsilon(0.1, 0.5, 100, 1e-5) == epsilon(0.1, 0.5, 100, 1e-5, accountant="rdp") > 100
    # Numbers of torch and NumPy are numbers.
    as_tensor: Any = torch.tensor(1.0)
    assert epsilon(as_tensor, 0.1, 10, 1e-5) == epsilon(1.0, 0.1, 10, 1e-5)


def test_epsilon_grows_with_steps_and_rate_and_falls_with_noise() -> None:
    for name in ("prv", "rdp"):
        known: Any = {"accountant": name, "delta": 1e-5}
        base = epsilon(1.0, 0.01, 100, **known)
        assert epsilon(1.0, 0.01, 1000, **known) > base
        assert epsilon(1.0, 0.02, 100, **known) > base
        assert epsilon(1.1, 0.01, 100, **known) < base
        assert epsilon(1.0, 0.01, 100, accountant=name, delta=1e-7) > base  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "rate", "steps", "accountant"),
    [
        (1.0, RATE, STEPS, "rdp"),
        (0.5, 0.01, 2, "prv"),
        (0.05, 0.01, 20, "rdp"),
        (30.0, 1.0, 4, "rdp"),
    ],
)
def test_noise_multiplier_is_the_inverse(
    target: float, rate: float, steps: int, accountant: Any
) -> None:
    """Never above what was asked for, and within 0.5 % of it."""
    sigma = noise_multiplier(target, rate, steps, DELTA, accountant)
    assert 0.995 * target <= epsilon(sigma, rate, steps, DELTA, accountant) <= target


INVALID: list[tuple[str, Any]] = [
    *(("noise_multiplier", bad) for bad in (-1.0, math.nan, math.inf, True, "1", None)),
    *(("sample_rate", bad) for bad in (0, -0.1, 1.1, math.nan, math.inf, True, "1", None)),
    *(("steps", bad) for bad in (-1, 1.5, math.inf, True, "1", None)),
    *(("delta", bad) for bad in (0, 1, 1.0, -1e-5, math.nan, True, "1", None)),
    *(("accountant", bad) for bad in ("gdp", None, 1)),
]


@pytest.mark.parametrize(("name", "bad"), INVALID, ids=lambda value: repr(value))
def test_arguments_out_of_range(name: str, bad: Any) -> None:
    good = {"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 1, "delta": 1e-5}
    with pytest.raises((ValueError, TypeError), match=f"Invalid {name}: "):
        epsilon(**{**good, name: bad})
    if name == "noise_multiplier":
        return
    del good["noise_multiplier"]
    with pytest.raises((ValueError, TypeError), match=f"Invalid {name}: "):
        noise_multiplier(1.0, **{**good, name: bad})


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, True, "1", None])
def test_an_epsilon_out_of_range(bad: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="Invalid epsilon: "):
        noise_multiplier(bad, 0.1, 1, 1e-5)


def test_an_epsilon_that_no_noise_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efsgd.privacy.accounting._MOST_NOISE", 10.0)
    words = r"Invalid epsilon: 1e-12\. Not reached with noise.*Take fewer steps"
    with pytest.raises(ValueError, match=words):
        noise_multiplier(1e-12, 0.1, 1, 1e-12, accountant="rdp")
