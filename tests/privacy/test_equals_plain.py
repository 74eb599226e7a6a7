"""Without noise, and with a clipping norm that clips nothing, it is the plain optimizer."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd.testing.strategies import seeds, world_sizes
from tests.privacy.teams import (
    FAMILY,
    SHAPES,
    Make,
    give,
    made_records,
    private_team,
    start_of,
    take_step,
)
from tests.simulation import bits, copied, parameters_of, through_a_file
from tests.strategies import examples

#: A power of two, and whole numbers as gradients: sums and means have no rounding.
BATCH = 16


def whole_numbers(counts: list[int], *seed: int) -> list[list[Tensor]]:
    return [[g.mul(2).round() for g in own] for own in made_records(SHAPES, counts, *seed)]


def optimizer_of(member: Any) -> Any:
    return member[0] if isinstance(member, tuple) else member


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
@examples(12)
@given(
    world_size=world_sizes(),
    counts=st.lists(st.integers(0, 5), min_size=8, max_size=8),
    observer=st.sampled_from(["messages", "sum"]),
    seed=seeds(),
)
def test_it_equals_the_plain_optimizer(
    make: Make, world_size: int, counts: list[int], observer: str, seed: int
) -> None:
    """Bitwise, in parameters and state, over several steps; 3 workers round, and as much."""
    start = start_of(SHAPES)
    settings = {"noise_multiplier": 0.0, "max_grad_norm": 1e9, "expected_batch_size": BATCH}
    is_averaging = make in (FAMILY["PowerSGD"], FAMILY["AdamW"])
    own = {**settings, "observer": observer if is_averaging else "messages"}
    team = private_team(world_size, make, start, **own)
    plain: list[Any] = []
    for _ in range(world_size):
        optimizer, averager = make(copied(start))
        plain.append(optimizer if averager is None else (optimizer, averager))
    for step in range(3):
        records = whole_numbers(counts[:world_size], seed, step)
        give(team, records)
        for member, own_records in zip(plain, records, strict=True):
            parameters = parameters_of(optimizer_of(member))
            for parameter, gradients in zip(parameters, own_records, strict=True):
                parameter.grad = gradients.sum(0) / (BATCH / world_size)
        messages = take_step(team)[1]
        assert bits(messages) == bits(take_step(plain)[1])
    for member, private in zip(plain, team, strict=True):
        saved = private.state_dict()
        assert saved.pop("privacy")["releases"]
        assert bits(saved) == bits(optimizer_of(member).state_dict())
        assert bits(parameters_of(private)) == bits(parameters_of(optimizer_of(member)))


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_bytes_are_those_without_privacy(make: Make) -> None:
    """But for comparing noise and naming the training, once; and so are all statistics."""
    team = private_team(3, make)
    plain: list[Any] = []
    for _ in range(3):
        optimizer, averager = make(copied(start_of(SHAPES)))
        plain.append(optimizer if averager is None else (optimizer, averager))
    own = 0
    for step in range(3):
        records = made_records(SHAPES, [4, 0, 2], step)
        give(team, records)
        for member, listed in zip(plain, records, strict=True):
            for parameter, gradients in zip(
                parameters_of(optimizer_of(member)), listed, strict=True
            ):
                parameter.grad = gradients.sum(0)
        trace, expected = take_step(team)[0], take_step(plain)[0]
        if step == 0:
            place = [each.purpose for each in trace].index("digests of noise")
            # Digests of the settings of privacy, two of noise, and the number of the training.
            agreed = [each.nbytes for each in trace[place - 1 : place + 2]]
            assert agreed[1:] == [16, 8]
            own = sum(agreed)
            del trace[place - 1 : place + 2]
        assert trace == expected
        sender = plain[0][1] if isinstance(plain[0], tuple) else plain[0]
        stats, plain_stats = team[0].communication_stats(), sender.communication_stats()
        for name in ("total_bytes_sent", "check_bytes_sent"):
            assert stats.pop(name) - plain_stats.pop(name) == own
        assert stats == plain_stats
    assert through_a_file(team[0].state_dict()).keys() == {"state", "param_groups", "privacy"}
    assert torch.is_tensor(parameters_of(team[0])[0])
