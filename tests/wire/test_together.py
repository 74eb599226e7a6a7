"""Exchanges that are driven by turns: in which order, with which results, and what fails how."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efsgd.errors import CollectiveError
from efsgd.testing import lockstep
from efsgd.wire.collectives import AllGather, AllReduceMean, Exchange, Start, run
from efsgd.wire.together import one_by_one, together
from efsgd.wire.transports import Alone

Kinds = Sequence[str]
kinds = st.lists(st.sampled_from(["waits", "starts", "gathers"]), max_size=4)


def sums(name: str, kinds: Kinds, worker: int) -> Exchange[list[float]]:
    """A collective of each kind, whose values depend on the answers before it."""
    found: list[float] = []
    for number, kind in enumerate(kinds):
        value = torch.tensor([sum(found) + number + worker, len(name)], dtype=torch.float64)
        purpose = f"{number} of {name}"
        if kind == "waits":
            answer = yield AllReduceMean(value, purpose)
        elif kind == "starts":
            in_flight = yield Start(AllReduceMean(value, purpose))
            answer = yield in_flight
        else:
            answer = (yield AllGather(value, purpose)).sum(0)
        found.append(answer[0].item())
    return found


@given(st.lists(kinds, max_size=4), st.integers(1, 3))
def test_results_are_those_of_one_after_the_other(listed: list[Kinds], world_size: int) -> None:
    def all_of(worker: int) -> list[Exchange[list[float]]]:
        return [sums(f"exchange {n}", kinds, worker) for n, kinds in enumerate(listed)]

    found = lockstep([together(all_of(worker)) for worker in range(world_size)])
    expected = lockstep([one_by_one(all_of(worker)) for worker in range(world_size)])
    assert found.results == expected.results
    rounds = [int(each.purpose.split()[0]) for each in found.trace]
    assert rounds == sorted(rounds)
    assert sorted(map(str, found.trace)) == sorted(map(str, expected.trace))


def test_each_is_started_before_the_one_before_it_is_awaited() -> None:
    events: list[str] = []

    class Noting(Alone):
        def start(self, collective: AllReduceMean) -> object:  # type: ignore[override]
            events.append(f"starts {collective.purpose}")

            def wait() -> torch.Tensor:
                events.append(f"awaits {collective.purpose}")
                return collective.buffer

            return wait

    run(together([sums(name, ["waits", "starts"], 0) for name in ("a", "b")]), Noting())
    assert events == [
        "starts 0 of a",
        "starts 0 of b",
        "awaits 0 of a",
        "starts 1 of a",
        "awaits 0 of b",
        "starts 1 of b",
        "awaits 1 of a",
        "awaits 1 of b",
    ]


@pytest.mark.parametrize("fail_at", range(6))
def test_a_failure_is_raised_where_it_was_asked_for_and_the_others_are_closed(fail_at: int) -> None:
    ended: list[str] = []

    def noted(name: str) -> Exchange[list[float]]:
        try:
            return (yield from sums(name, ["waits", "starts", "gathers"], 0))
        except BaseException as error:
            ended.append(f"{name} {type(error).__name__}")
            raise

    with pytest.raises(CollectiveError, match="injected"):
        lockstep([together([noted("a"), noted("b")])], fail_at=fail_at)
    failed, closed = ("a", "b") if fail_at % 2 == 0 else ("b", "a")
    # Before the last round of all, one may have ended by itself.
    assert ended == [f"{failed} CollectiveError"] + [f"{closed} GeneratorExit"] * (fail_at < 5)


def test_one_alone_asks_for_what_it_asks_for() -> None:
    exchange = together([sums("a", ["waits"], 0)])
    assert isinstance(next(exchange), AllReduceMean)
