"""Misuse: each is refused in words that say what was given and what to do, and changes nothing."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer
from opacus.utils.uniform_sampler import DistributedUniformWithReplacementSampler
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from efsgd import CollectiveError, GradientAverager, PowerSGDOptimizer, Signum, TopK
from efsgd.privacy import PrivateOptimizer, poisson_batches
from tests.optimizers.misuse import Case, ids
from tests.privacy.teams import (
    FAMILY,
    SETTINGS,
    SHAPES,
    adamw,
    give,
    hooked,
    made_records,
    model,
    power_sgd,
    private_team,
    signum,
    start_of,
    step_with,
    take_step,
    top_k,
    uncompressed,
)
from tests.simulation import bits, copied, parameters_of

Team = list[PrivateOptimizer]


def own_parameters() -> list[torch.Tensor]:
    return copied(start_of(SHAPES))


def making(optimizer: Any = None, **settings: Any) -> Callable[[], object]:
    """Constructs one with these settings."""

    def act() -> object:
        made = power_sgd(own_parameters())[0] if optimizer is None else optimizer()
        return PrivateOptimizer(made, **{**SETTINGS, **settings})

    return act


NOISE, NORM = "standard deviation of noise", "norm to which the gradient of each record is clipped"
EXPECTED, PROBABILITY = "records in a step of all workers", "probability with which a record"
#: Settings out of range: name, values, remedy.
SETTINGS_OUT_OF_RANGE: list[tuple[str, tuple[Any, ...], str]] = [
    ("noise_multiplier", (-1.0, math.nan, math.inf, True, None, "1"), NOISE),
    ("max_grad_norm", (0, 0.0, -1.0, math.nan, math.inf, True, None, "1"), NORM),
    ("expected_batch_size", (0, -8, math.nan, math.inf, True, None, "8"), EXPECTED),
    ("sample_rate", (0, 0.0, -0.1, 1.5, math.nan, math.inf, True, "0.1"), PROBABILITY),
    ("observer", ("Sum", None, True, 1), "Must be 'messages' or 'sum'"),
]
ROWS = [(name, bad, remedy) for name, values, remedy in SETTINGS_OUT_OF_RANGE for bad in values]


@pytest.mark.parametrize(("name", "bad", "remedy"), ROWS, ids=lambda value: repr(value))
def test_settings_out_of_range(name: str, bad: Any, remedy: str) -> None:
    """At construction, and at the step after a change, which is undone by the user."""
    case = Case(name, making(**{name: bad}), ValueError, f"Invalid {name}: {bad!r}", remedy)
    case.check()
    team, twins = middle_of_training(), middle_of_training()
    give(team, made_records(SHAPES, [3, 3], 5))
    good = getattr(team[1], name)
    setattr(team[1], name, bad)
    with pytest.raises(CollectiveError, match="say themselves why: worker 1") as caught:
        take_step(team)
    (own,) = caught.value.__notes__
    assert own.startswith(f"worker 1: ValueError: Invalid {name}: {bad!r}")
    assert remedy in own
    setattr(team[1], name, good)
    assert_unchanged(team, twins)


def middle_of_training(make: Any = power_sgd, **settings: Any) -> Team:
    """Two workers that have taken two steps, always the same."""
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    team = private_team(2, make, generators=generators, **settings)
    for step in range(2):
        step_with(team, made_records(SHAPES, [3, 2], step))
    return team


def values_of(team: Team) -> Any:
    """Parameters and state of all workers, but for how much was released."""
    saved = [(parameters_of(o), {**o.state_dict(), "privacy": None}) for o in team]
    return bits(copy.deepcopy(saved))


def assert_unchanged(team: Team, twins: Team) -> None:
    """They are bitwise workers that were not misused, and train on."""
    assert values_of(team) == values_of(twins)
    step_with(team, made_records(SHAPES, [3, 2], 9))
    assert all(bits(parameters_of(o)) == bits(parameters_of(team[0])) for o in team)


# ---- construction -------------------------------------------------------------------------------


def used(make: Any) -> Callable[[], Any]:
    """An optimizer that has taken a step without noise."""

    def made() -> Any:
        optimizer, averager = make(own_parameters())
        for parameter, value in zip(parameters_of(optimizer), start_of(SHAPES), strict=True):
            parameter.grad = value
        (optimizer if averager is None else averager).step()
        return optimizer if averager is None else averager

    return made


def taken() -> Any:
    made = making()()
    return made.original_optimizer  # type: ignore[attr-defined]


def of_opacus() -> DPOptimizer:
    inner = torch.optim.SGD(own_parameters())
    return DPOptimizer(inner, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=8)


def around(module_type: type) -> nn.Module:
    """A module that says it is of this type, without a process group."""
    made = module_type.__new__(module_type)
    nn.Module.__init__(made)
    made.inner = model()
    return made


def with_batch_norm() -> nn.Module:
    batch_norm = nn.BatchNorm1d(6, affine=False, track_running_stats=False)
    return GradSampleModule(nn.Sequential(nn.Linear(8, 6), batch_norm))


def with_weight(weight: float) -> PowerSGDOptimizer:
    optimizer = PowerSGDOptimizer(own_parameters())
    optimizer.weight = weight
    return optimizer


def half() -> PowerSGDOptimizer:
    return PowerSGDOptimizer(copied(start_of(SHAPES, torch.float16)))


def ghost(max_grad_norm: float) -> nn.Module:
    return GradSampleModuleFastGradientClipping(model(), max_grad_norm=max_grad_norm)


def without_one() -> Callable[[], object]:
    parameters = own_parameters()
    return making(lambda: torch.optim.SGD(parameters), averager=GradientAverager(parameters[1:]))


GATHERS = "observer='sum', but {} gathers"
AVERAGES = "Use observer='messages', or a compressor that averages"
HOLDS, NEW = "holds gradients of single records", "Construct a new one"
CONSTRUCTION = [
    Case("an optimizer of Opacus", making(of_opacus), TypeError,
         "Invalid optimizer: DPOptimizer, of Opacus", "Give the optimizer that is within it"),
    Case("no optimizer", making(model), TypeError, "Invalid optimizer: Sequential",
         "Must be an optimizer"),
    Case("SGD without an averager", making(lambda: torch.optim.SGD(own_parameters())), TypeError,
         "SGD does not exchange gradients", "averager=GradientAverager(model.parameters())"),
    Case("an averager too many", making(averager=GradientAverager(own_parameters())), TypeError,
         "PowerSGDOptimizer exchanges gradients itself", "Leave out averager"),
    Case("an optimizer as averager", making(lambda: torch.optim.SGD(own_parameters()),
         averager=PowerSGDOptimizer(own_parameters())), TypeError,
         "SGD does not exchange gradients", "averager=GradientAverager(model.parameters())"),
    Case("a parameter that is not averaged", without_one(), ValueError,
         "Parameters [0] of SGD are not in the averager", "Give both the same parameters"),
    Case("two around one", making(taken), ValueError, "belongs to a PrivateOptimizer already",
         "Construct another one"),
    *(Case(f"errors of {name}", making(used(make)), ValueError, HOLDS, NEW)
      for name, make in FAMILY.items() if name != "AdamW"),
    Case("errors of an averager", lambda: making(lambda: torch.optim.SGD(own_parameters()),
         averager=used(adamw)())(), ValueError, HOLDS, NEW),
    Case("the sum of Top-K", making(lambda: top_k(own_parameters())[0], observer="sum"),
         ValueError, GATHERS.format("TopK"), AVERAGES),
    Case("the sum of signs", making(lambda: signum(own_parameters())[0], observer="sum"),
         ValueError, GATHERS.format("MajorityVote"), AVERAGES),
    Case("the sum of an averager that gathers", lambda: making(
         lambda: torch.optim.SGD(own := own_parameters()) and torch.optim.SGD(own),
         averager=GradientAverager(own_parameters(), TopK(density=0.1)), observer="sum")(),
         ValueError, GATHERS.format("TopK"), AVERAGES),
    Case("a weight", making(lambda: with_weight(0.5)), ValueError, "weight=0.5", "Must be 1.0"),
    Case("float16", making(half), ValueError, "parameter 0 is float16",
         "Use float32 or bfloat16 parameters"),
    Case("DPDDP", making(module=around(DifferentiallyPrivateDistributedDataParallel)), TypeError,
         "The model is a DifferentiallyPrivateDistributedDataParallel",
         "wrap the plain model in opacus.GradSampleModule"),
    Case("DDP", making(module=around(nn.parallel.DistributedDataParallel)), TypeError,
         "The model is a DistributedDataParallel", "optimizer.broadcast_parameters()"),
    Case("BatchNorm", making(module=with_batch_norm()), TypeError,
         "The module '1' is a BatchNorm1d", "Use nn.GroupNorm"),
    Case("ghost clipping to another norm", making(module=ghost(2.0)), ValueError,
         "The model clips to 2.0, but max_grad_norm is 1.0", "Give both the same"),
]  # fmt: skip


@pytest.mark.parametrize("case", ids(CONSTRUCTION))
def test_construction(case: Case) -> None:
    case.check()


def test_a_refused_optimizer_is_as_it_was() -> None:
    optimizer = used(power_sgd)()
    before = bits(copy.deepcopy((parameters_of(optimizer), optimizer.state_dict())))
    for settings in ({}, {"observer": "messages", "noise_multiplier": -1}):
        with pytest.raises(ValueError):
            PrivateOptimizer(optimizer, **{**SETTINGS, **settings})
    assert bits((parameters_of(optimizer), optimizer.state_dict())) == before
    assert optimizer.engine.preparations == []
    fresh = power_sgd(own_parameters())[0]
    with pytest.raises(ValueError, match="noise_multiplier"):
        PrivateOptimizer(fresh, **{**SETTINGS, "noise_multiplier": -1})
    PrivateOptimizer(fresh, **SETTINGS)  # it does not belong to the one that was refused


def test_steps_that_leave_nothing_behind_may_have_been_taken_before() -> None:
    """Without error feedback later messages do not depend on earlier gradients."""
    optimizer = uncompressed(own_parameters())[0]
    for parameter in parameters_of(optimizer):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert PrivateOptimizer(optimizer, **SETTINGS).guarantees(1e-5)["messages"]["rdp"] == 0.0


def test_it_is_neither_copied_nor_pickled() -> None:
    optimizer = middle_of_training()[0]
    for action in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"two would draw the same noise.*state_dict\(\)"):
            action(optimizer)


def test_checkpoints_whose_errors_hold_gradients_without_noise() -> None:
    saved = used(power_sgd)().state_dict()
    for team, twins in [(middle_of_training(), middle_of_training())]:
        with pytest.raises(ValueError, match=r"errors of training.*load checkpoints of private"):
            team[0].load_state_dict(saved)
        assert_unchanged(team, twins)
    local = used(signum)().state_dict()
    with pytest.raises(ValueError, match="holds gradients of single records"):
        PrivateOptimizer(Signum(own_parameters()), **SETTINGS).load_state_dict(local)


@pytest.mark.parametrize("make", FAMILY.values(), ids=FAMILY)
def test_errors_without_noise_are_loaded_by_nobody(make: Any) -> None:
    """Neither by the wrapped optimizer, nor by its averager."""
    saved = used(make)().state_dict()
    team, twins = middle_of_training(make), middle_of_training(make)
    sender: Any = team[0].averager or team[0].original_optimizer
    with pytest.raises(ValueError, match="holds gradients of single records"):
        sender.load_state_dict(saved)
    assert_unchanged(team, twins)
    own = copy.deepcopy(sender.state_dict())
    sender.load_state_dict(own)  # its own have noise
    other = private_team(1, make)[0]
    (other.averager or other.original_optimizer).load_state_dict(own)


# ---- sampling -----------------------------------------------------------------------------------


class Endless(Dataset[Any]):
    """It has no length."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(1)


SHARD = TensorDataset(torch.arange(10.0))
SAMPLER = DistributedUniformWithReplacementSampler.__new__(DistributedUniformWithReplacementSampler)
PART = "give each worker its own part"
SAMPLING = [
    *(Case(f"shard {type(bad).__name__}", lambda bad=bad: poisson_batches(bad, 0.1, 5), TypeError,
           f"Invalid shard: {type(bad).__name__}", PART)
      for bad in (DataLoader(SHARD), SAMPLER, Endless(), None)),
    Case("an empty shard", lambda: poisson_batches(TensorDataset(torch.zeros(0)), 0.1, 5),
         ValueError, "it has no records", "at least one"),
    *(Case(f"rate {bad!r}", lambda bad=bad: poisson_batches(SHARD, bad, 5), ValueError,
           f"Invalid rate: {bad!r}", PROBABILITY)
      for bad in (0, -0.1, 1.5, math.nan, math.inf, True, None, "1")),
    *(Case(f"steps {bad!r}", lambda bad=bad: poisson_batches(SHARD, 0.1, bad), ValueError,
           f"Invalid steps: {bad!r}", "Must be an integer of at least 1")
      for bad in (0, -1, 2.5, True, None, "1")),
]  # fmt: skip


@pytest.mark.parametrize("case", ids(SAMPLING))
def test_sampling(case: Case) -> None:
    case.check()


def test_models_are_given_as_they_are() -> None:
    """A module without layers that mix records is fine, and so is none."""
    module = hooked()
    optimizer = PowerSGDOptimizer(module.parameters(), lr=0.1)
    assert PrivateOptimizer(optimizer, **SETTINGS, module=module).loss_reduction == "mean"


def test_a_private_optimizer_is_not_wrapped_again() -> None:
    private = private_team(1)[0]
    with pytest.raises(TypeError, match="is private already"):
        PrivateOptimizer(private, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=4)


@pytest.mark.parametrize("option", ["batch_size", "shuffle", "sampler", "drop_last"])
def test_who_is_in_a_batch_is_not_for_others_to_decide(option: str) -> None:
    with pytest.raises(TypeError, match=rf"Invalid {option}: .* Leave it out"):
        poisson_batches(TensorDataset(torch.zeros(4)), 0.5, 2, **{option: 2})
