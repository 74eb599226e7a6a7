"""Sums of clipped gradients beside a naive float64 reference, and what a poisoned record can do."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd.privacy import PrivateOptimizer
from efsgd.privacy.clipping import clipped_sums
from efsgd.testing.strategies import Shape, seeds, shape_lists, world_sizes
from tests.privacy.teams import (
    FAMILY,
    SETTINGS,
    SHAPES,
    Make,
    Records,
    flat,
    give,
    gradients_of,
    made_records,
    private_team,
    seeded,
    start_of,
    step_watched,
    step_with,
    take_step,
    uncompressed,
)
from tests.simulation import bits, copied, parameters_of
from tests.strategies import examples

#: Of clipped sums, relative to C for each record: rounding of dtypes, and of sums over elements.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 1e-5}


def naive_sum(records: list[Tensor], clip: float) -> Tensor:
    """Σ_i g_i min(1, C / (‖g_i‖ + 1e-6)), one record at a time, all tensors as one vector."""
    total = torch.zeros(sum(math.prod(own.shape[1:]) for own in records), dtype=torch.float64)
    for position in range(len(records[0])):
        gradient = flat([own[position] for own in records])
        norm = math.sqrt(sum(float(x) ** 2 for x in gradient))
        if math.isfinite(norm):
            total += gradient * min(1.0, clip / (norm + 1e-6))
    return total


@examples(100)
@given(
    shape_lists(max_size=3),
    st.integers(0, 4),
    st.sampled_from(list(TOLERANCES)),
    st.sampled_from([1e-30, 1e-6, 0.1, 1.0, 1e3, 1e25]),
    st.sampled_from([1e-3, 1.0, 50.0]),
    seeds(),
)
def test_clipping_is_that_of_a_naive_reference(
    shapes: list[Shape], count: int, dtype: torch.dtype, scale: float, clip: float, seed: int
) -> None:
    made = [own.to(dtype) for own in made_records(shapes, [count], seed, scale=scale)[0]]
    parameters = copied(start_of(shapes, dtype))
    found = clipped_sums(dict(zip(parameters, made, strict=True)), clip)
    assert [found[p].shape for p in parameters] == [p.shape for p in parameters]
    total = flat([found[p] for p in parameters])
    expected = naive_sum(made, clip)
    assert total.numel() == 0 or (
        (total - expected).abs().max() <= TOLERANCES[dtype] * clip * max(count, 1)
    )
    # Rounding again: each record's share may be longer than C by as much.
    assert total.norm() <= count * clip * (1 + TOLERANCES[dtype])


@examples(25)
@given(world_sizes(), st.lists(st.integers(0, 5), min_size=8, max_size=8), seeds())
def test_workers_divide_sums_by_the_expected_batch(
    world_size: int, counts: list[int], seed: int
) -> None:
    """B/W on every worker, however many records it has."""
    records = made_records(SHAPES, counts[:world_size], seed)
    team = private_team(world_size, noise_multiplier=0, max_grad_norm=2.5, expected_batch_size=19.5)
    start = flat(parameters_of(team[0]))
    step_with(team, records)
    means = [naive_sum(own, 2.5) * world_size / 19.5 for own in records]
    for optimizer, mean in zip(team, means, strict=True):
        assert (flat(gradients_of(optimizer)) - mean).abs().max() < 1e-13
    update = torch.stack(means).mean(0)
    assert (start - flat(parameters_of(team[0])) - update).abs().max() < 1e-12


def test_parts_of_a_batch_are_one_batch() -> None:
    """Skipped steps collect sums."""
    whole = made_records(SHAPES, [6])
    once, collected = (private_team(1, generators=seeded(1)) for _ in range(2))
    step_with(once, whole)
    for part in (slice(0, 4), slice(4, 5)):
        collected[0].signal_skip_step()
        give(collected, [[own[part] for own in whole[0]]])
        before = bits(parameters_of(collected[0]))
        collected[0].step()
        assert bits(parameters_of(collected[0])) == before
        collected[0].zero_grad()  # as loops do between backward passes
    step_with(collected, [[own[5:] for own in whole[0]]])
    difference = flat(gradients_of(once[0])) - flat(gradients_of(collected[0]))
    assert difference.abs().max() < 1e-14  # sums in another order
    # What a step that is not taken has collected is forgotten.
    collected[0].signal_skip_step(do_skip=False)
    give(collected, whole)
    collected[0].zero_grad()
    step_with(collected, made_records(SHAPES, [0]))
    drawn = flat(gradients_of(collected[0])) * SETTINGS["expected_batch_size"]
    twin = seeded(1)[0]
    for _ in range(2):
        expected = [torch.randn(s, generator=twin, dtype=torch.float64) for s in SHAPES]
    assert (drawn - flat(expected)).abs().max() < 1e-14


def test_a_batch_is_used_up() -> None:
    team = private_team(1)
    give(team, made_records(SHAPES, [3]))
    take_step(team)
    assert all(p.grad_sample is None for p in parameters_of(team[0]))
    with pytest.raises(ValueError, match=r"no gradients of records since the last step.*zero_grad"):
        take_step(team)


@pytest.mark.parametrize("is_part", [False, True], ids=["step", "part"])
def test_a_record_of_several_backward_passes_does_not_count_twice(is_part: bool) -> None:
    """Opacus keeps a list, of which each is clipped by itself: one record would add up to 2 C."""
    team = private_team(1)
    before = bits(parameters_of(team[0]))
    records = made_records(SHAPES, [1], scale=100.0)[0]
    for parameter, own in zip(parameters_of(team[0]), records, strict=True):
        parameter.grad_sample = [own, own.clone()]
    if is_part:
        team[0].signal_skip_step()
        team[0].step()
    with pytest.raises(ValueError, match=r"records from 2 backward passes.*BatchMemoryManager"):
        team[0].step()
    assert bits(parameters_of(team[0])) == before
    assert team[0].guarantees(1e-5)["messages"]["rdp"] == 0.0
    assert_nothing_is_left(team[0])


def assert_nothing_is_left(optimizer: PrivateOptimizer) -> None:
    """Of the last batch: a step without noise, and without another one, changes nothing."""
    assert all(getattr(p, "grad_sample", None) is None for p in parameters_of(optimizer))
    before = bits(parameters_of(optimizer))
    optimizer.noise_multiplier = 0.0
    optimizer.step()
    assert bits(parameters_of(optimizer)) == before


FAILURES: dict[str, tuple[type[Exception], dict[str, Any], dict[str, Any]]] = {
    "a setting of privacy": (ValueError, {"noise_multiplier": -1.0}, {}),
    "a setting of the optimizer": (ValueError, {}, {"nonfinite": "ignore"}),
    "far too many records": (ValueError, {"expected_batch_size": 1e-3}, {}),
    "a scaler": (RuntimeError, {"grad_scale": 2.0}, {}),
}


@pytest.mark.parametrize("has_part", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_batch_is_used_up_where_its_step_fails(failure: str, has_part: bool) -> None:
    """Records of it would be in the next sum a second time."""
    expected, settings, of_group = FAILURES[failure]
    team = private_team(1)
    optimizer = team[0]
    if has_part:
        optimizer.signal_skip_step()
        give(team, made_records(SHAPES, [2]))
        optimizer.step()
    give(team, made_records(SHAPES, [3]))
    kept = {name: getattr(optimizer, name, None) for name in settings}
    group, kept_group = optimizer.param_groups[0], dict(optimizer.param_groups[0])
    for name, value in settings.items():
        setattr(optimizer, name, value)
    group.update(of_group)
    with pytest.raises(expected):
        optimizer.step()
    for name, value in kept.items():
        setattr(optimizer, name, value)
    group.update(kept_group)
    assert_nothing_is_left(optimizer)


def test_a_batch_is_used_up_where_its_closure_fails() -> None:
    team = private_team(1)

    def closure() -> float:
        give(team, made_records(SHAPES, [3]))
        raise KeyError("a loss")

    with pytest.raises(KeyError):
        team[0].step(closure)
    assert_nothing_is_left(team[0])


def test_a_batch_is_used_up_where_the_wrapped_optimizer_is_stepped_and_fails() -> None:
    team = private_team(1)
    give(team, made_records(SHAPES, [3]))
    team[0].noise_multiplier = -1.0
    with pytest.raises(ValueError, match="noise_multiplier"):
        team[0].original_optimizer.step()
    assert_nothing_is_left(team[0])


def test_gradients_of_frozen_parameters_are_not_kept() -> None:
    """Until they are trained again, and another batch is there."""
    team = private_team(1, noise_multiplier=0.0)
    parameter = parameters_of(team[0])[1]
    before = bits(parameter)
    give(team, made_records(SHAPES, [3]))
    parameter.requires_grad_(False)
    team[0].zero_grad()
    parameter.requires_grad_(True)
    team[0].step()
    assert bits(parameter) == before


# ---- a poisoned record --------------------------------------------------------------------------

POISON = [math.nan, math.inf, -math.inf, 1e30, 1e200, 1e-30, 1.0]


def poisoned(records: Records, worker: int, value: float) -> Records:
    """One more record on one worker, whose gradient is this everywhere."""
    found = [list(own) for own in records]
    found[worker] = [torch.cat([g, torch.full_like(g[:1], value)]) for g in records[worker]]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("value", POISON)
def test_a_poisoned_record_moves_no_message_by_more_than_the_clip(
    value: float, dtype: torch.dtype
) -> None:
    """The same noise, and one record more on worker 1: C / (B/W) at most, and nobody else's."""
    world_size, clip = 3, SETTINGS["max_grad_norm"]
    records = made_records(SHAPES, [4, 3, 0])
    messages = []
    for own in (records, poisoned(records, 1, value)):
        team = private_team(world_size, uncompressed, start_of(SHAPES, dtype), seeded(1, 2, 3))
        messages.append(step_with(team, own))
    bound = clip / (SETTINGS["expected_batch_size"] / world_size)
    for worker, (before, after) in enumerate(zip(*messages, strict=True)):
        moved = float((flat(after) - flat(before)).norm())
        # Rounding of sums of float32 (1e-7), which are of the size of the bound.
        assert moved <= bound * (1 + 1e-5) if worker == 1 else moved == 0
    if value in (1.0, 1e30):  # others are zero, nothing that can be clipped, or too large for that
        assert float((flat(messages[1][1]) - flat(messages[0][1])).norm()) > 0.9 * bound


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_a_poisoned_record_moves_what_is_compressed_by_no_more_than_the_clip(make: Make) -> None:
    records = made_records(SHAPES, [4, 3])
    found = []
    for own in (records, *(poisoned(records, 1, value) for value in POISON)):
        team = private_team(2, make, generators=seeded(1, 2))
        found.append([flat(noisy) for noisy in step_watched(team, own)[1]])
    bound = SETTINGS["max_grad_norm"] / (SETTINGS["expected_batch_size"] / 2)
    for seen in found[1:]:
        assert torch.equal(seen[0], found[0][0])
        assert float((seen[1] - found[0][1]).norm()) <= bound * (1 + 1e-12)


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_nothing_that_is_sent_is_a_function_of_gradients_without_noise(make: Make) -> None:
    """An optimizer without privacy, given the noisy gradients, sends the same and is the same."""
    team, start = private_team(3, make), start_of(SHAPES)
    plain: list[Any] = []
    for _ in range(3):
        optimizer, averager = make(copied(start))
        plain.append(optimizer if averager is None else (optimizer, averager))
    for step in range(4):
        messages, noisy = step_watched(team, made_records(SHAPES, [4, 0, 2], step))
        for member, own in zip(plain, noisy, strict=True):
            optimizer = member[0] if isinstance(member, tuple) else member
            for parameter, gradient in zip(parameters_of(optimizer), own, strict=True):
                parameter.grad = gradient
        assert bits(take_step(plain)[1]) == bits(messages)
        for member, private in zip(plain, team, strict=True):
            optimizer = member[0] if isinstance(member, tuple) else member
            assert bits(parameters_of(optimizer)) == bits(parameters_of(private))
