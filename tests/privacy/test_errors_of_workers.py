"""What keeps one worker from a private step is told to all: nobody waits, and nothing changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from efsgd import CollectiveError, PowerSGDOptimizer, WorkerMismatchError
from efsgd.privacy import PrivateOptimizer
from efsgd.privacy.requirements import require_probable
from tests.privacy.teams import (
    FAMILY,
    SHAPES,
    Make,
    adamw,
    give,
    made_records,
    power_sgd,
    private_team,
    seeded,
    start_of,
    step_with,
    take_step,
    top_k,
    uncompressed,
)
from tests.privacy.test_refusals import assert_unchanged, middle_of_training, values_of
from tests.simulation import bits, parameters_of

Edit = Callable[[PrivateOptimizer], object]


def first(optimizer: PrivateOptimizer) -> Any:
    return parameters_of(optimizer)[0]


def unsupported(optimizer: PrivateOptimizer) -> None:
    """A layer for which Opacus has computed nothing."""
    parameter = first(optimizer)
    parameter.grad, parameter.grad_sample = torch.ones_like(parameter), None


def clipped_by_opacus(optimizer: PrivateOptimizer) -> None:
    first(optimizer).grad_sample._processed = True


def other_count(optimizer: PrivateOptimizer) -> None:
    first(optimizer).grad_sample = first(optimizer).grad_sample[:1]


def many(optimizer: PrivateOptimizer) -> None:
    for parameter in parameters_of(optimizer):
        parameter.grad_sample = torch.zeros(200, *parameter.shape)  # type: ignore[attr-defined]


def norms(optimizer: PrivateOptimizer) -> None:
    first(optimizer).grad_sample, first(optimizer)._norm_sample = None, torch.ones(3)


def used_up(optimizer: PrivateOptimizer) -> None:
    """Nobody has computed anything since the last step."""
    for parameter in parameters_of(optimizer):
        parameter.grad_sample = None  # type: ignore[attr-defined]
        parameter.grad = optimizer._records.written[parameter]


def not_averaged(optimizer: PrivateOptimizer) -> None:
    optimizer.add_param_group({"params": [torch.ones(3, requires_grad=True)]})


MISTAKES: dict[str, tuple[Edit, str, str]] = {
    "no gradients of records": (unsupported, "parameter 0 has a gradient, but none of single",
                                "Wrap the model in opacus.GradSampleModule"),
    "Opacus's optimizer": (clipped_by_opacus, "parameter 0 have been clipped by an optimizer",
                           "do without PrivacyEngine.make_private"),
    "other counts": (other_count, "different numbers of records: 1 for parameter 0 and 3",
                     "trained on the same batch"),
    "too many records": (many, "200 records in a batch of this worker", "declare more, or draw"),
    "norms": (norms, "parameter 0 has norms of gradients", "Give module="),
    "a step without a batch": (used_up, "no gradients of records since the last step",
                               "Call zero_grad()"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "given", "remedy"), MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_an_error_on_one_worker_is_an_error_on_all(
    make: Make, edit: Edit, given: str, remedy: str
) -> None:
    team, twins = middle_of_training(make), middle_of_training(make)
    give(team, made_records(SHAPES, [3, 3], 7))
    edit(team[1])
    with pytest.raises(CollectiveError, match="say themselves why: worker 1") as caught:
        take_step(team)
    (own,) = caught.value.__notes__
    assert own.startswith("worker 1: ValueError: ")
    assert given in own
    assert remedy in own
    assert_unchanged(team, twins)


@pytest.mark.parametrize(("edit", "given", "remedy"), MISTAKES.values(), ids=MISTAKES)
def test_the_same_alone(edit: Edit, given: str, remedy: str) -> None:
    team = private_team(1, power_sgd)
    step_with(team, made_records(SHAPES, [3]))
    before = values_of(team)
    give(team, made_records(SHAPES, [3]))
    edit(team[0])
    with pytest.raises(ValueError) as caught:
        team[0].step()
    assert given in str(caught.value)
    assert remedy in str(caught.value)
    assert values_of(team) == before
    team[0].zero_grad()
    step_with(team, made_records(SHAPES, [3]))


def test_a_group_that_the_averager_does_not_know() -> None:
    team = middle_of_training(adamw)
    give(team, made_records(SHAPES, [3, 3], 7))
    not_averaged(team[1])
    with pytest.raises(CollectiveError, match="worker 1") as caught:
        take_step(team)
    assert "Parameters [4] of AdamW are not in the averager" in caught.value.__notes__[0]


# ---- before the first step ----------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [(1, 2, 1), (1, 7, 1 + 2**32)], ids=["equal", "32 bits"])
@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_equal_noise_is_refused_on_all_workers(make: Make, seeds: tuple[int, ...]) -> None:
    """A seed has 32 bits on a CPU: those beyond make no difference."""
    team = private_team(3, make, generators=seeded(*seeds))
    before = bits([parameters_of(o) for o in team])
    for _ in range(2):  # however often it is tried
        for optimizer in team:
            optimizer.zero_grad()
        give(team, made_records(SHAPES, [3, 3, 3]))
        with pytest.raises(ValueError, match="Workers 0 and 2 draw the same noise") as caught:
            take_step(team)
        assert "seed it differently on every worker" in str(caught.value)
        assert [n.split(":")[1] for n in caught.value.__notes__] == [" ValueError"] * 2
        assert bits([parameters_of(o) for o in team]) == before


def test_equal_seeds_of_which_one_has_moved_on_are_refused() -> None:
    generators = seeded(4, 4)
    torch.randn(100, generator=generators[1])
    team = private_team(2, generators=generators)
    give(team, made_records(SHAPES, [3, 3]))
    with pytest.raises(ValueError, match="draw the same noise"):
        take_step(team)


def test_one_generator_of_two_workers_in_a_state_of_another_seed_is_refused() -> None:
    first_one, second = seeded(4, 5)
    second.set_state(first_one.get_state())
    team = private_team(2, generators=[first_one, second])
    give(team, made_records(SHAPES, [3, 3]))
    with pytest.raises(ValueError, match="draw the same noise"):
        take_step(team)


def test_without_noise_equal_seeds_are_no_matter() -> None:
    team = private_team(2, generators=seeded(4, 4), noise_multiplier=0)
    step_with(team, made_records(SHAPES, [3, 3]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", 2.0), ("max_grad_norm", 0.5), ("expected_batch_size", 17),
        ("observer", "sum"), ("sample_rate", 0.1),
    ],
)  # fmt: skip
def test_settings_must_be_equal_on_all_workers(name: str, value: Any) -> None:
    team = private_team(3)
    setattr(team[1], name, value)
    before = bits([parameters_of(o) for o in team])
    give(team, made_records(SHAPES, [3, 3, 3]))
    with pytest.raises(WorkerMismatchError, match=rf"worker 1: {name}={value}"):
        take_step(team)
    assert bits([parameters_of(o) for o in team]) == before


@pytest.mark.parametrize("make", [uncompressed, adamw])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise_multiplier", 2.0), ("max_grad_norm", 0.5), ("expected_batch_size", 17),
        ("observer", "sum"), ("sample_rate", 0.1),
    ],
)  # fmt: skip
def test_settings_must_change_on_all_workers_before_the_same_step(
    name: str, value: Any, make: Make
) -> None:
    """Nothing with other noise, or divided otherwise, is sent or applied."""
    make = top_k if make is uncompressed and name != "observer" else make
    team = private_team(3, make)
    step_with(team, made_records(SHAPES, [3, 3, 3]))
    before, kept = bits([parameters_of(o) for o in team]), getattr(team[1], name)
    setattr(team[1], name, value)
    for _ in range(2):
        give(team, made_records(SHAPES, [3, 3, 3]))
        with pytest.raises(WorkerMismatchError, match=r"worker 1 has changed .* private training"):
            take_step(team)
        assert bits([parameters_of(o) for o in team]) == before
    setattr(team[0], name, value)
    setattr(team[2], name, "messages" if name == "observer" else 3 * value / 4)
    give(team, made_records(SHAPES, [3, 3, 3]))
    with pytest.raises(WorkerMismatchError, match="worker 2"):
        take_step(team)
    assert bits([parameters_of(o) for o in team]) == before
    for optimizer in team:
        setattr(optimizer, name, value)
    step_with(team, made_records(SHAPES, [3, 3, 3]))
    for optimizer in team:
        setattr(optimizer, name, kept)
        optimizer.plan_change()  # as a schedule would, for fewer bytes
    step_with(team, made_records(SHAPES, [3, 3, 3]))
    assert all(bits(parameters_of(o)) == bits(parameters_of(team[0])) for o in team)


def test_a_setting_that_is_set_back_needs_no_other_worker() -> None:
    team, twins = middle_of_training(), middle_of_training()
    give(team, made_records(SHAPES, [3, 3]))
    team[1].noise_multiplier = 2.0
    with pytest.raises(WorkerMismatchError, match="worker 1"):
        take_step(team)
    team[1].noise_multiplier = 1.0
    assert_unchanged(team, twins)


# ---- scalers, and batches -----------------------------------------------------------------------


def test_a_grad_scaler_is_refused() -> None:
    optimizer = private_team(1, power_sgd, start_of(SHAPES, torch.float32))[0]
    give([optimizer], made_records(SHAPES, [3]))
    for parameter in parameters_of(optimizer):
        parameter.grad = torch.ones_like(parameter)
    before = bits(parameters_of(optimizer))
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"GradScaler multiplies losses.*without a scaler"):
        scaler.step(optimizer)
    assert bits(parameters_of(optimizer)) == before
    assert optimizer.guarantees(1e-5)["messages"]["rdp"] == 0.0


def test_batches_as_large_as_chance_makes_them_are_fine() -> None:
    """Twice the mean, for shards of other sizes, and what a Poisson distribution adds."""
    require_probable(16, 16, 1)
    require_probable(42, 16, 1)
    with pytest.raises(ValueError, match="48 records in a batch"):
        require_probable(48, 16, 1)
    # A batch that is too large by little is found by and by.
    team = private_team(2, power_sgd)
    with pytest.raises(CollectiveError, match="worker 1") as caught:
        for step in range(60):
            step_with(team, made_records(SHAPES, [8, 24], step))
    assert "batches of this worker, where expected_batch_size" in caught.value.__notes__[0]


def test_the_wrapped_optimizer_takes_no_step_without_noise() -> None:
    """Whoever calls it."""
    team = private_team(1, power_sgd)
    inner = team[0].original_optimizer
    assert isinstance(inner, PowerSGDOptimizer)
    for parameter in parameters_of(inner):
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match="none of single records"):
        inner.step()
    inner.zero_grad()
    give(team, made_records(SHAPES, [0]))
    before = parameters_of(inner)[0].detach().clone()
    inner.step()
    assert bool((parameters_of(inner)[0] != before).any())


def test_an_optimizer_beside_an_averager_takes_no_step_without_noise() -> None:
    """It knows nothing of noise, and is stepped by PrivateOptimizer alone."""
    optimizer = private_team(1, adamw)[0]
    inner = optimizer.original_optimizer
    for _ in range(2):
        before = bits(parameters_of(inner))
        for parameter in parameters_of(inner):
            parameter.grad = torch.ones_like(parameter)
        for step in (inner.step, lambda: torch.amp.GradScaler("cpu", enabled=False).step(inner)):
            with pytest.raises(
                RuntimeError, match=r"AdamW belongs to a PrivateOptimizer.*step\(\)"
            ):
                step()
        assert bits(parameters_of(inner)) == before
        optimizer.zero_grad()
        give([optimizer], made_records(SHAPES, [2]))
        optimizer.step()
        assert bits(parameters_of(inner)) != before


def test_a_parameter_that_is_frozen_with_a_gradient() -> None:
    """The other optimizer would apply it, and the averager makes no other one."""
    optimizer = private_team(1, adamw)[0]
    parameter = parameters_of(optimizer)[2]
    parameter.grad = torch.ones_like(parameter)
    parameter.requires_grad_(False)
    before = bits(parameters_of(optimizer))
    with pytest.raises(ValueError, match=r"Parameters \[2\] of AdamW .* call zero_grad\(\)"):
        optimizer.step()
    assert bits(parameters_of(optimizer)) == before
    optimizer.zero_grad()
    optimizer.step()
    assert bits(parameter) == before[2]
