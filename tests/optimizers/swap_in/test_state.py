"""C: what is in `state` and in `param_groups`, and what users may do to them."""

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from efsgd import PowerSGDOptimizer
from tests.optimizers.swap_in.pairs import (
    FORMS,
    FULL_RANK,
    IMPLEMENTATIONS,
    UNCOMPRESSED,
    assert_equal,
    give,
    gradients,
    pair,
    start,
    train,
)
from tests.simulation import bits, copied, make_workers, parameters_of, replicated, step_with


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("form", FORMS)
def test_state_is_tensors_by_parameter(form: str, momentum: float) -> None:
    """C1: keys are parameters, values dicts of tensors, the same for every implementation."""
    keys = {}
    for name, implementation in IMPLEMENTATIONS.items():
        if form == "paper" and name == "fused":
            continue
        optimizer, _ = pair(start(), FORMS[form], lr=0.1, momentum=momentum, **implementation)
        train([optimizer], range(2))
        assert set(optimizer.state) <= set(parameters_of(optimizer))
        for own in optimizer.state.values():
            assert all(isinstance(key, str) for key in own)
            assert all(isinstance(value, Tensor) for value in own.values())
            assert len(own) > 0  # as with SGD, no dict has nothing in it
        keys[name] = [sorted(optimizer.state[p]) for p in parameters_of(optimizer)]
    assert all(each == keys["default"] for each in keys.values())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_checkpoints_are_exchanged_with_sgd(momentum: float) -> None:
    """C2: back and forth in mid-run, bit by bit; a buffer is there exactly with momentum."""
    ours, theirs = pair(start(), UNCOMPRESSED, lr=0.1, momentum=momentum, weight_decay=0.1)
    train([ours, theirs], range(2))
    for optimizer in (ours, theirs):
        present = ["momentum_buffer" in optimizer.state[p] for p in parameters_of(optimizer)]
        assert present == [momentum != 0] * len(present)
    swapped_ours, swapped_theirs = pair(parameters_of(ours), UNCOMPRESSED, lr=9.0)
    swapped_ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    swapped_theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    everyone = [ours, theirs, swapped_ours, swapped_theirs]
    train(everyone, range(2, 5))
    for optimizer in everyone:
        assert_equal(optimizer, theirs)
    assert set(theirs.param_groups[0]) <= set(swapped_ours.param_groups[0])


def test_foreign_keys_in_state() -> None:
    """C3: whatever a program keeps there under names of its own, it finds again."""
    optimizer, twin = (pair(start(), FULL_RANK, lr=0.1, momentum=0.9)[0] for _ in range(2))
    for key, value in (("count", 3), ("flag", True), ("note", "of mine")):
        optimizer.state[key] = value
    train([optimizer, twin], range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    assert (saved["state"]["count"], saved["state"]["flag"]) == (3, True)
    optimizer.load_state_dict(saved)
    assert (optimizer.state["count"], optimizer.state["note"]) == (3, "of mine")
    train([optimizer, twin], range(2, 4))
    assert bits(parameters_of(optimizer)) == bits(parameters_of(twin))


def test_a_group_that_is_added_later() -> None:
    """C4: with overrides of its own, state from the beginning, and SGD's numbers."""
    optimizers = pair(start(), UNCOMPRESSED, lr=0.1, momentum=0.9)
    train(optimizers, range(2))
    for optimizer in optimizers:
        more = copied(start(shapes=[(6, 5), (5,)]))
        optimizer.add_param_group({"params": more, "lr": 0.3, "momentum": 0.5, "nesterov": True})
    assert all("momentum_buffer" in optimizers[0].state[p] for p in parameters_of(optimizers[0]))
    train(optimizers, range(2, 5))
    assert_equal(*optimizers)


def test_a_group_that_all_workers_add() -> None:
    """C4: they compare it as they compared the first ones, and go on alike."""
    workers = make_workers([p.detach() for p in start()], 2, lr=0.1, momentum=0.9, rank=2)
    step_with(workers, [gradients(start(), w) for w in range(2)])
    for optimizer in workers:
        fresh = copied(start(shapes=[(9, 7)]))
        optimizer.add_param_group({"params": fresh, "rank": 1})
    everything = [*start(), *start(shapes=[(9, 7)])]
    trace = step_with(workers, [gradients(everything, 2 + w) for w in range(2)])
    assert [t.kind for t in trace][-2:] == ["AllReduceMean"] * 2
    assert replicated(workers[0]) == replicated(workers[1])


def test_reordering_is_legal() -> None:
    """C5: parameters of a group, and groups, may change their places between steps."""
    options = {"lr": 0.1, "momentum": 0.9}
    optimizer, twin = (pair(start(torch.float64), FULL_RANK, **options)[0] for _ in range(2))
    order = list(range(len(parameters_of(optimizer))))
    for step in range(4):
        given_ = gradients(parameters_of(twin), step)
        give(twin, given_)
        give(optimizer, [given_[index] for index in order])
        optimizer.step()
        twin.step()
        for index, p in zip(order, parameters_of(optimizer), strict=True):
            # The same sums in batches of another order: rounding in float64.
            assert torch.allclose(p, parameters_of(twin)[index], rtol=0.0, atol=1e-13)
        optimizer.param_groups[0]["params"].reverse()
        order.reverse()


@pytest.mark.parametrize("extra", [UNCOMPRESSED, FULL_RANK], ids=["off", "full rank"])
def test_freezing_and_thawing(extra: dict[str, Any]) -> None:
    """C5: a frozen parameter rests; thawed, it goes on with the momentum it had."""
    optimizers = pair(start(torch.float64), extra, lr=0.1, momentum=0.9, weight_decay=0.1)
    for step in range(6):
        is_frozen = step in (2, 3)
        for optimizer in optimizers:
            p = parameters_of(optimizer)[4]
            p.requires_grad_(not is_frozen)
            given_: list[Tensor | None] = list(gradients(parameters_of(optimizer), step))
            if is_frozen:
                given_[4] = None
            before = p.detach().clone()
            give(optimizer, given_)
            optimizer.step()
            assert torch.equal(p, before) == is_frozen
    for mine, other in zip(*map(parameters_of, optimizers), strict=True):
        # Full rank in float64: rounding.
        assert torch.allclose(mine, other, rtol=0.0, atol=0.0 if extra is UNCOMPRESSED else 1e-13)


def test_groups_hold_plain_values() -> None:
    """C6: what JSON knows, so that every format can hold it."""
    optimizer = PowerSGDOptimizer([{"params": start(), "rank": 2}, {"params": start()}], lr=0.1)
    train([optimizer], range(1))
    groups = optimizer.state_dict()["param_groups"]
    assert json.loads(json.dumps(groups)) == groups
    assert copy.deepcopy(groups) == groups


def test_names() -> None:
    """C7: names of parameters are saved, loaded, and left out by those who have none."""

    def named(optimizer_class: Any, **options: Any) -> Any:
        return optimizer_class(torch.nn.Linear(4, 3).named_parameters(), lr=0.1, **options)

    saved = named(PowerSGDOptimizer).state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    assert saved["param_groups"][0]["params"] == [0, 1]
    for target in (
        named(PowerSGDOptimizer),
        named(SGD),
        PowerSGDOptimizer(torch.nn.Linear(4, 3).parameters(), lr=0.1),
    ):
        target.load_state_dict(copy.deepcopy(saved))
        train([target], range(1))
    unnamed = SGD(torch.nn.Linear(4, 3).parameters(), lr=0.3).state_dict()
    ours, theirs = named(PowerSGDOptimizer), named(SGD)
    for target in (ours, theirs):
        target.load_state_dict(copy.deepcopy(unnamed))
    expected = theirs.param_groups[0].get("param_names")
    assert ours.param_groups[0].get("param_names") == expected
    train([ours], range(1))  # its errors speak of parameters, with or without names
