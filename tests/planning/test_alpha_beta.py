"""The model of time, by hand."""

import math
from typing import Any

import pytest

from efsgd.planning import Link


def test_time_of_an_all_reduce() -> None:
    link = Link(workers=8, latency=2e-4, bandwidth=1e8)
    # 14 rounds; a chunk of 0.8 MB takes 1 ms, and the latency passes meanwhile.
    assert link.seconds(800_000) == pytest.approx(14 * 1e-3)
    # Of a chunk that takes 0.1 ms, one half is hidden by the other one's latency.
    assert link.seconds(80_000) == pytest.approx(14 * (2e-4 + 0.5e-4))
    assert link.seconds(0) == pytest.approx(14 * 2e-4)


@pytest.mark.parametrize("latency", [1e-5, 2e-4, 5e-2])  # hidden by the large one, and not hidden
def test_alpha_and_beta_are_found_again(latency: float) -> None:
    link = Link(8, latency, bandwidth=1e8)
    small, large = ((n, link.seconds(n)) for n in (1024, 4_000_000))
    found = Link.measured(8, small, large)
    assert found.latency == pytest.approx(link.latency)
    assert found.bandwidth == pytest.approx(link.bandwidth)


def test_bandwidth_cannot_be_told_where_more_bytes_were_faster() -> None:
    with pytest.raises(ValueError, match="more bytes must take longer"):
        Link.measured(2, (1024, 0.5), (4_000_000, 0.4))


def test_time_in_a_tree() -> None:
    link = Link(workers=10, latency=1e-3, bandwidth=1e6, algorithm="tree")
    # Two trees of height 4, up and down; each worker sends 2 * 9/10 of its bytes.
    assert link.seconds(50_000) == pytest.approx(8e-3 + 0.09)
    assert Link(2, 1e-3, 1e6, "tree").seconds(50_000) == pytest.approx(2e-3 + 0.05)


def test_time_of_gathering() -> None:
    link = Link(workers=10, latency=1e-3, bandwidth=1e6)
    assert link.gather_seconds(50_000) == pytest.approx(9 * 0.05)
    assert link.gather_seconds(1000) == pytest.approx(9 * (1e-3 + 0.5e-3))
    # A tree has nothing to add up.
    assert Link(10, 1e-3, 1e6, "tree").gather_seconds(1000) == link.gather_seconds(1000)
    assert link.exchange_seconds(50_000) == pytest.approx(9e-3 + 0.045)


def test_collectives_by_name() -> None:
    link = Link(workers=10, latency=1e-3, bandwidth=1e6)
    assert link.seconds_of("AllReduceMean", 7e4) == link.seconds(7e4)
    assert link.seconds_of("AllGather", 7e4) == link.gather_seconds(7e4)
    assert link.seconds_of("AllToAll", 7e4) == link.exchange_seconds(7e4)
    with pytest.raises(ValueError, match="No time is known of Broadcast"):
        link.seconds_of("Broadcast", 4)


@pytest.mark.parametrize("latency", [0.0, 1e-5, 5e-2])
def test_a_tree_is_found_again(latency: float) -> None:
    link = Link(6, latency, 1e8, "tree")
    small, large = ((n, link.seconds(n)) for n in (1024, 4_000_000))
    found = Link.measured(6, small, large, "tree")
    assert found.latency == pytest.approx(latency, abs=1e-9)  # of a difference of two
    assert found.bandwidth == pytest.approx(1e8)


@pytest.mark.parametrize(
    ("name", "value", "unit"),
    [
        ("workers", 1, "an integer of at least 2"),
        ("workers", 2.5, "an integer of at least 2"),
        ("latency", -1e-9, "in seconds"),
        ("latency", math.nan, "in seconds"),
        ("bandwidth", 0, "in bytes per second"),
        ("bandwidth", math.inf, "a finite number above 0"),
        ("algorithm", "star", "'ring' or 'tree'"),
    ],
)
def test_numbers_out_of_range(name: str, value: Any, unit: str) -> None:
    right: dict[str, Any] = {"workers": 2, "latency": 0.0, "bandwidth": 1.0}
    with pytest.raises(ValueError, match=f"Invalid {name}: .*{unit}"):
        Link(**{**right, name: value})
