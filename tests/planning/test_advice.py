"""Predicted steps by hand, laws that hold for all of them, and what is said of them."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efsgd import PowerSGD, SignNorm, TopK
from efsgd.planning import Link, Plan, advise
from efsgd.planning.advice import make_plan
from efsgd.planning.measuring import Work, link_exchange, measure_passes, measure_work
from efsgd.planning.prediction import Setup, ranges_where
from efsgd.planning.sending import Sending
from efsgd.planning.tensors import trained_of
from efsgd.testing import lockstep
from efsgd.wire.collectives import Collective, intercept
from tests.rank.made_time import MadeClock

SHAPES = [(512, 256), (256,)] * 4
CANDIDATES = {
    "PowerSGD(rank=1)": PowerSGD(1),
    "PowerSGD(rank=4)": PowerSGD(4),
    "TopK(density=0.01)": TopK(density=0.01),
    "SignNorm()": SignNorm(),
}
COMPUTE: dict[str, Any] = {
    "SGD": 1e-3,
    "PowerSGD(rank=1)": 4e-3,
    "PowerSGD(rank=4)": 4e-3,
    "TopK(density=0.01)": [8e-3, 1e-3],
    "SignNorm()": [8e-3, 1e-3],
}
SENDINGS = {name: Sending(each, trained_of(SHAPES)) for name, each in CANDIDATES.items()}


def planned(**changes: Any) -> Plan:
    options = {"workers": 8, "bandwidth": 125e6, "latency": 2e-4, "forward": 0.01}
    options |= {"backward": 0.02, "compute": COMPUTE, "candidates": CANDIDATES}
    return advise(SHAPES, **{**options, **changes})


def test_a_step_by_hand() -> None:
    """Of one matrix, with two workers, so that a ring has two rounds with half of the bytes."""
    trained = trained_of([(1000, 500), (500,)])
    setup = Setup(trained, forward=0.25, backward=0.5, update=Work(0.125))
    link = Link(workers=2, latency=0.01, bandwidth=1e6)
    # One bucket, complete when the backward pass ends, in chunks longer than the latency.
    ddp = 0.25 + 0.5 + 2 * (2_002_000 / 2 / 1e6) + 0.125
    assert setup.seconds_of_ddp(link) == pytest.approx(ddp)
    assert setup.seconds_alone() == 0.875
    # P with the vector and 4 words, and Q, in chunks that are shorter than the latency.
    P, Q = 4 * (4 * 1000 + 500 + 4), 4 * (4 * 500)
    seconds = 0.75 + 0.375 + sum(2 * (0.01 + S / 4 / 1e6) for S in (P, Q))
    rank_4 = Sending(PowerSGD(4), trained)
    assert P / 2 / 1e6 < 0.01
    assert setup.seconds_of(rank_4, Work(0.375), link) == pytest.approx(seconds)
    # What is gathered travels once, whole; a further payload is decompressed.
    payload = SignNorm().payload_bytes(trained.shapes)
    gathered = 2 * (0.01 + 4 * 4 / 4 / 1e6) + max(payload / 1e6, 0.01 + payload / 2e6)
    found = setup.seconds_of(Sending(SignNorm(), trained), Work(0.375, 0.5), link)
    assert found == pytest.approx(0.75 + 0.375 + 0.5 + gathered)


def test_ddp_sends_while_the_backward_pass_goes_on() -> None:
    trained = trained_of([(2**20,)] * 2)  # two buckets of 4 MiB, at half and at the whole of it
    link = Link(workers=2, latency=0.0, bandwidth=2.0**22)
    assert Setup(trained, 1.0, 10.0, Work(0.5)).seconds_of_ddp(link) == 1 + 10 + 1 + 0.5
    assert Setup(trained, 1.0, 1.0, Work(0.5)).seconds_of_ddp(link) == 1 + 0.5 + 1 + 1 + 0.5
    at_once = dataclasses.replace(trained, arrivals=(1.0, 1.0))
    assert Setup(at_once, 1.0, 10.0, Work(0.5)).seconds_of_ddp(link) == 1 + 10 + 2 + 0.5


LINKS = st.builds(
    Link,
    workers=st.integers(2, 10_000),
    latency=st.floats(0, 0.1),
    bandwidth=st.floats(1e4, 1e12),
    algorithm=st.sampled_from(["ring", "tree"]),
)
SETUP = Setup(trained_of(SHAPES), 0.01, 0.02, Work(1e-3))


@given(LINKS, st.floats(1, 1000))
def test_a_better_network_is_never_slower(link: Link, factor: float) -> None:
    wider = dataclasses.replace(link, bandwidth=link.bandwidth * factor)
    nearer = dataclasses.replace(link, latency=link.latency / factor)
    for better, sending in itertools.product((wider, nearer), SENDINGS.values()):
        work, slack = Work(4e-3), 1 + 1e-12  # sums are rounded
        assert SETUP.seconds_of(sending, work, better) <= slack * SETUP.seconds_of(
            sending, work, link
        )
        assert SETUP.seconds_of_ddp(better) <= slack * SETUP.seconds_of_ddp(link)
        assert SETUP.seconds_alone() <= SETUP.seconds_of_ddp(better)


@given(LINKS, st.sampled_from(sorted(CANDIDATES)))
def test_break_even_points_part_what_pays_from_what_does_not(link: Link, name: str) -> None:
    work = {name: Work(4e-3)}
    plan = make_plan(SETUP, link, {name: SENDINGS[name]}, work)
    (row,) = plan.rows
    assert row.speed_up == pytest.approx(plan.ddp / row.seconds)
    assert (plan.best is None) == (row.seconds >= plan.ddp)

    def speed_up(**at: Any) -> float:
        own = dataclasses.replace(link, **at)
        seconds = plan.setup.seconds_of(SENDINGS[name], plan.work[name], own)
        return plan.setup.seconds_of_ddp(own) / seconds

    for first, last in row.bandwidths:
        assert speed_up(bandwidth=first) > 1 and speed_up(bandwidth=last) > 1
        assert last > 9e12 or speed_up(bandwidth=1.001 * last) <= 1
        assert first < 1.1e3 or speed_up(bandwidth=first / 1.001) <= 1
    for first, last in row.workers:
        assert speed_up(workers=int(first)) > 1 and speed_up(workers=int(last)) > 1
        assert last == 100_000 or speed_up(workers=int(last) + 1) <= 1
        assert first == 2 or speed_up(workers=int(first) - 1) <= 1


def test_ranges() -> None:
    assert ranges_where(lambda n: False, [1, 2]) == ()
    assert ranges_where(lambda n: True, [1, 2, 3]) == ((1, 3),)
    found = ranges_where(lambda x: x < 5 or x > 50, [1.0, 10.0, 100.0])
    assert found == ((1.0, pytest.approx(5)), (pytest.approx(50), 100.0))


def test_advice_to_compress_takes_the_highest_rank_that_costs_nothing() -> None:
    plan = planned(bandwidth=1.25e6)
    assert plan.best == "PowerSGD(rank=1)"  # at 10 Mbit/s a higher rank is slower
    assert plan.advice.startswith("Use PowerSGD(rank=1). A step takes")
    plan = planned(bandwidth=125e6)
    assert plan.best == "PowerSGD(rank=4)"
    assert "measure both" not in planned(bandwidth=12.5e6).advice


def test_advice_not_to_compress() -> None:
    plan = planned(bandwidth=125e9, latency=1e-6)
    assert plan.best is None and plan.ddp < min(row.seconds for row in plan.rows)
    assert plan.advice.startswith("Do not compress. A step under DDP takes 31")
    assert "With 8 workers it pays at up to" in plan.advice
    assert "Do not compress" in str(plan)


def test_gains_within_the_error_of_the_model_are_doubted() -> None:
    close = next(
        plan
        for plan in (planned(bandwidth=b * 125e6, latency=1e-5) for b in (1, 2, 4, 8, 16, 32))
        if 1 < max(row.speed_up for row in plan.rows) < 1.25
    )
    assert close.advice.endswith("than predictions may be wrong by, 25 %: measure both.")


def test_what_is_gathered_is_taken_where_no_rank_pays() -> None:
    slow = {**COMPUTE, "PowerSGD(rank=1)": 9.0, "PowerSGD(rank=4)": 9.0}
    plan = planned(workers=2, compute=slow, bandwidth=1.25e6)
    assert plan.best == "TopK(density=0.01)"
    assert "What each worker receives grows with their number" in plan.advice


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 1}, "Invalid workers: 1. Must be an integer of at least 2"),
        ({"bandwidth": -3}, "Invalid bandwidth: -3. .*bytes per second"),
        ({"latency": "2ms"}, "Invalid latency: '2ms'. .*in seconds"),
        ({"forward": -1.0}, "Invalid forward: -1.0. .*in seconds; or give loss="),
        ({"backward": None}, "Invalid backward: None. .*in seconds; or give loss="),
        ({"algorithm": "star"}, "Invalid algorithm: 'star'"),
        ({"compute": {"SGD": -1}}, "Invalid compute of 'SGD': -1. .*in seconds"),
        ({"compute": {"SGD": [1, 2, 3]}}, "Invalid compute of 'SGD': .*one or two"),
        ({"bandwidth": None}, "no network to measure: this process is alone"),
        ({"loss": lambda: torch.zeros(())}, "Passes of shapes cannot be measured"),
    ],
)
def test_numbers_out_of_range_are_said_early(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(**changes)


def test_passes_and_compressing_are_measured() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    passes = measure_passes(list(model.parameters()), lambda: model(torch.ones(4, 32)).sum())
    assert passes.forward > 0 and passes.backward > 0
    # The last layer has its gradients first.
    assert 0 <= max(passes.arrivals[2:]) < min(passes.arrivals[:2]) <= 1
    assert all(parameter.grad is None for parameter in model.parameters())
    model(torch.ones(4, 32)).sum().backward()  # nobody takes stamps any more

    plan = advise(
        model,
        workers=4,
        bandwidth=1e6,
        latency=1e-3,
        loss=lambda: model(torch.ones(4, 32)).sum(),
        candidates={"a": PowerSGD(1), "b": SignNorm()},
    )
    assert plan.setup.trained.arrivals is not None
    assert plan.work.keys() == {"SGD", "a", "b"} and plan.work["a"].each_payload == 0
    assert all(work.step > 0 for work in plan.work.values())


def test_what_is_decompressed_grows_with_the_workers() -> None:
    sending = Sending(SignNorm(), trained_of([(64, 64)]))
    work = measure_work(sending, repeats=1)
    assert work.seconds(9) == work.step + 8 * work.each_payload


@pytest.mark.parametrize("algorithm", ["ring", "tree"])
@pytest.mark.parametrize("bandwidth", [1e6, 1e9])
def test_a_link_is_found_by_all_workers(algorithm: str, bandwidth: float) -> None:
    """Where a mebibyte is not much slower than nothing, more are sent."""
    link = Link(3, 2e-4, bandwidth, algorithm)

    def slowed() -> Any:
        clock = MadeClock()

        def outgoing(collective: Collective) -> None:
            clock.now += link.seconds(collective.nbytes)

        exchange = link_exchange(torch.device("cpu"), 3, algorithm, repeats=1, clock=clock)
        return intercept(exchange, outgoing)

    found = lockstep([slowed() for _ in range(3)])
    enough = 10 * link.seconds(1024)
    sizes = (size for size in (2**20, 2**22, 2**24) if link.seconds(size) >= enough)
    assert max(each.nbytes for each in found.trace) == next(sizes)
    for own in found.results:
        assert own == found.results[0]
        assert own.latency == pytest.approx(link.latency)
        assert own.bandwidth == pytest.approx(link.bandwidth)
