"""Checkpoints of rank schedulers: to the bit with as many workers, else the same decisions."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from efsgd.checkpoint import consolidation
from efsgd.rank import LGreCo, RankPolicy
from efsgd.testing import lockstep
from tests.rank.rank_policies import Still
from tests.rank.rank_runs import (
    SHAPES,
    SQUARE,
    Team,
    accordion,
    all_of,
    go_on,
    made_gradients,
    run_windows,
)
from tests.simulation import bits, difference, parameters_of, through_a_file
from tests.strategies import gaussian

ORDERS = ["scheduler first", "optimizer first"]

Saved = tuple[list[Any], dict[str, Any], dict[str, Any]]


def save(team: Team, worker: int) -> Saved:
    """Parameters, and the state_dicts of optimizer and scheduler of one worker."""
    optimizer, scheduler = team.optimizers[worker], team.schedulers[worker]
    values = [p.detach() for p in parameters_of(optimizer)]
    return through_a_file((values, optimizer.state_dict(), scheduler.state_dict()))


def save_consolidated(team: Team) -> Saved:
    count = len(team.optimizers)
    dicts = lockstep([consolidation(optimizer) for optimizer in team.optimizers]).results
    schedulers = team.consolidated()
    assert all(bits(own) == bits(dicts[0]) for own in dicts) and len(dicts) == count
    assert all(bits(own) == bits(schedulers[0]) for own in schedulers)
    values = [p.detach() for p in parameters_of(team.optimizers[0])]
    return through_a_file((values, dicts[0], schedulers[0]))


def load(team: Team, saved: Sequence[Saved], order: str) -> None:
    """Gives each worker what was saved, in one of two orders."""
    pairs = zip(team.optimizers, team.schedulers, saved, strict=True)
    for optimizer, scheduler, (values, own, own_of_scheduler) in pairs:
        for parameter, value in zip(parameters_of(optimizer), values, strict=True):
            parameter.data.copy_(value)
        if order == "scheduler first":
            scheduler.load_state_dict(own_of_scheduler)
        optimizer.load_state_dict(own)
        if order == "optimizer first":
            scheduler.load_state_dict(own_of_scheduler)


#: With a decision after every second window, or every window, and sums of the last steps or of all.
POLICIES: dict[str, Callable[[], RankPolicy]] = {
    "Accordion": lambda: accordion(interval=2, threshold=5.0, sketch=64),
    "Accordion, worker 0": lambda: accordion(interval=2, threshold=5.0, gradients="worker 0"),
    "L-GreCo": lambda: LGreCo(3, observations=1),
    "L-GreCo, every second window": lambda: LGreCo(3, interval=2),
    "L-GreCo and Accordion": lambda: LGreCo(accordion(interval=2, threshold=5.0), observations=1),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("at", "kind"),
    [
        (0, "Accordion"),
        (4, "Accordion"),
        (5, "Accordion, worker 0"),
        (7, "Accordion"),
        (9, "Accordion"),
        (6, "L-GreCo"),
        (7, "L-GreCo"),
        (7, "L-GreCo, every second window"),
        (5, "L-GreCo and Accordion"),
        (7, "L-GreCo and Accordion"),
    ],
)
def test_as_many_workers_go_on_to_the_bit(at: int, order: str, kind: str) -> None:
    team = Team(POLICIES[kind], 2, SHAPES, momentum=0.9, lr=0.01)
    before = go_on(team, 0, at)
    fresh = Team(POLICIES[kind], 2, SHAPES, momentum=0.9, lr=0.01)
    load(fresh, [save(team, worker) for worker in range(2)], order)
    decided = go_on(team, at, 12)
    assert go_on(fresh, at, 12) == decided
    assert all_of(fresh) == all_of(team)
    assert len({str(ranks) for ranks in before + decided}) > 1


def of_mean(window: int, step: int, worker: int, world_size: int) -> list[Any]:
    """Gradients that differ between workers, whose mean is the same for any number of them."""
    same = made_gradients(window, step, 0)
    if world_size == 1:
        return same
    noise = [gaussian(shape, window, step, i, 17) for i, shape in enumerate(SHAPES)]
    # Weights of the noise add up to zero: ..., -1, 0, 1, ...
    return [
        own + (worker - (world_size - 1) / 2) * extra
        for own, extra in zip(same, noise, strict=True)
    ]


@pytest.mark.parametrize(
    ("at", "order", "policy"),
    [
        (4, ORDERS[0], lambda: accordion(sketch=64)),
        (5, ORDERS[1], lambda: accordion(sketch=64)),
        (5, ORDERS[0], lambda: LGreCo(3, spectrum="svd")),
    ],
    ids=["between windows", "within a window", "L-GreCo"],
)
@pytest.mark.parametrize("count", [2, 3, 1, 8], ids=lambda count: f"{count} workers")
def test_another_number_of_workers_decides_the_same(
    count: int, at: int, order: str, policy: Callable[[], RankPolicy]
) -> None:
    def gradients(world_size: int) -> Callable[[int, int, int], Any]:
        return lambda window, step, worker: of_mean(window, step, worker, world_size)

    team = Team(policy, 4, SHAPES, momentum=0.9, lr=0.01)
    go_on(team, 0, at, gradients(4))
    fresh = Team(policy, count, SHAPES, momentum=0.9, lr=0.01)
    load(fresh, [save_consolidated(team)] * count, order)
    decided = go_on(team, at, 12, gradients(4))
    assert go_on(fresh, at, 12, gradients(count)) == decided
    assert len({str(ranks) for ranks in decided}) > 1
    values = [parameters_of(each.optimizers[0]) for each in (fresh, team)]
    # Means are sums in another order, rounded at 1e-16; power iteration passes it on for 8 steps.
    assert max(map(difference, *values)) < 1e-12
    norms = [each.schedulers[0].policy.state_dict().get("norms", {}) for each in (fresh, team)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-12)  # rounding of sums, as above


def test_a_consolidated_dict_has_the_means_of_the_sums_and_changes_nothing() -> None:
    team = Team(accordion, 3, SHAPES)
    go_on(team, 0, 5)
    before = all_of(team)
    (sums,) = team.consolidated()[0]["sums"]
    own = [scheduler.policy.accumulators[0].sums for scheduler in team.schedulers]
    for index, mean in sums["sums"].items():
        added = own[0][index] + own[1][index] + own[2][index]
        assert mean.equal(added / 3)
    assert sums["steps"] == 1
    assert all_of(team) == before


def test_a_state_dict_is_a_copy() -> None:
    team = Team(accordion, 1, SHAPES)
    go_on(team, 0, 3)
    saved = team.schedulers[0].state_dict()
    before = bits(saved)
    go_on(team, 3, 8)
    assert bits(saved) == before
    assert bits(team.schedulers[0].state_dict()) != before


def test_a_step_that_is_taken_again_after_loading_is_counted_again() -> None:
    team = Team(accordion)
    saved = save(team, 0)
    for _ in range(2):
        team.step_alike(4.0)
        assert team.schedulers[0].policy.accumulators[0].steps == 1
        load(team, [saved], "optimizer first")


def test_a_scheduler_that_is_loaded_by_itself_brings_its_values() -> None:
    team, fresh = (Team(accordion, 1, SHAPES) for _ in range(2))
    decided = go_on(team, 0, 4)
    fresh.schedulers[0].load_state_dict(save(team, 0)[2])
    assert fresh.ranks == decided[-1] == [1, 1, None, 1]


def test_another_interval_goes_on_from_what_was_saved() -> None:
    for gradients in ("mean", "worker 0"):
        long = Team(lambda g=gradients: accordion(interval=4, gradients=g), 2, SHAPES)
        run_windows(long, 0, 3)
        short = Team(lambda g=gradients: accordion(interval=1, gradients=g), 2, SHAPES)
        load(short, [save(long, worker) for worker in range(2)], "optimizer first")
        assert run_windows(short, 3, 4) == [[3, 3, None, 3]]  # nothing was summed up
        run_windows(short, 4, 6)


def alike(policy: Any = accordion, shapes: Any = SHAPES, **options: Any) -> dict[str, Any]:
    """The state_dict of another scheduler, in mid-window."""
    team = Team(policy, 1, shapes, **options)
    team.window_alike(*[4.0] * len(shapes))
    team.step_alike(*[4.0] * len(shapes))
    return team.schedulers[0].state_dict()


def changed(**entries: Any) -> dict[str, Any]:
    """That of a scheduler like ours, with other entries."""
    return {**alike(), **entries}


def with_sum(value: Any) -> dict[str, Any]:
    """That of a scheduler like ours, whose last layer's sum is another."""
    saved = alike()
    saved["sums"][0]["sums"][3] = value
    return saved


REFUSED = {
    "no dict": (lambda: 7, "it has 7. Must be what state_dict() of a RankScheduler"),
    "an optimizer's": (lambda: {"state": {}}, "it has ['state']. Must be what state_dict()"),
    "another policy's": (
        lambda: alike(Still),
        "in it Still has the rank of parameters [0, 1, 3], and here Accordion has",
    ),
    "another setting's": (
        lambda: alike(lambda: accordion(setting="min_compression_rate", low=0.5, high=1.5)),
        "Accordion has the min_compression_rate of parameters [0, 1, 3], and here",
    ),
    "another model's": (
        lambda: alike(shapes=[SQUARE, SQUARE]),
        "it is of 2 parameters, and the optimizer has 4. Make model and optimizer as they were",
    ),
    "of other shapes": (
        lambda: alike(shapes=[*SHAPES[:3], (9, 3, 3, 3)]),
        "the sum of parameter 3 has shape (9, 3, 3, 3), and the layer has (8, 3, 3, 3). Load",
    ),
    "a sum too many": (lambda: changed(sums=alike()["sums"] * 2), "Make model and policy as"),
    "no sum of ours": (lambda: with_sum(torch.zeros(2)), "parameter 3 has shape (2,)"),
    "values out of range": (
        lambda: changed(values={0: 1, 1: 0, 3: 1}),
        "Invalid rank: 0. Must be an integer of at least 1",
    ),
    "a policy's part that lacks something": (
        lambda: changed(policy={"windows": 5}),
        "Accordion cannot restore {'windows': 5}. Must be what state_dict()",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_loaded_is_refused_and_changes_nothing(name: str) -> None:
    make, words = REFUSED[name]
    team = Team(accordion, 1, SHAPES)
    go_on(team, 0, 5)
    before, state_dict = all_of(team), make()
    with pytest.raises(ValueError) as caught:
        team.schedulers[0].load_state_dict(copy.deepcopy(state_dict))
    assert words in str(caught.value)
    assert all_of(team) == before
    twin = Team(accordion, 1, SHAPES)
    go_on(twin, 0, 8)
    go_on(team, 5, 8)
    assert all_of(team) == all_of(twin)
