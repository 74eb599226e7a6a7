"""Numbers and bools of NumPy and torch are numbers and bools, wherever one is taken.

Sweeps of hyperparameters draw them, and what is computed from shapes often is one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from efsgd import (
    ErrorFeedbackSGD,
    GradientAverager,
    PowerSGDOptimizer,
    RandomK,
    Signum,
    broadcast_buffers,
)
from efsgd.rank import Accordion, CommunicationBudget, LGreCo, Network, RankScheduler, StepTime
from efsgd.rank.policies.uniform import Uniform
from efsgd.testing import lockstep
from efsgd.testing.gradients import made_up
from efsgd.testing.trial import Trial
from tests.compressors.test_contract_suite import EVERY_COMPRESSOR
from tests.simulation import bits, parameters_of, step_with, through_a_file

SHAPES = [(12, 10), (10,), (9, 8)]

#: Exact in float32, so that a number of less precision is the same.
SGD = {
    "lr": 0.125,
    "momentum": 0.5,
    "dampening": 0.25,
    "weight_decay": 0.0625,
    "nesterov": False,
    "maximize": True,
    "foreach": True,
    "fused": False,
    "differentiable": False,
}
EXCHANGE = {
    "error_feedback": True,
    "start_compressing_at": 1,
    "max_grad_norm": 2.0,
    "check_every": 2,
}
POWERSGD = {
    "rank": 2,
    "min_compression_rate": 0.5,
    "warm_start": True,
    "seed": 3,
    "compile": False,
    "alternating": True,
}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "PowerSGDOptimizer": (PowerSGDOptimizer, {**SGD, **EXCHANGE, **POWERSGD}),
    "ErrorFeedbackSGD": (ErrorFeedbackSGD, {**SGD, **EXCHANGE}),
    "GradientAverager": (GradientAverager, EXCHANGE),
    "Signum": (Signum, {"lr": 0.125, "momentum": 0.5, "weight_decay": 0.25, "maximize": True}),
}


def of_numpy(value: Any) -> Any:
    if isinstance(value, bool):
        return numpy.bool_(value)
    if isinstance(value, int):
        return numpy.int64(value)
    return numpy.float32(value) if isinstance(value, float) else value


def of_torch(value: Any) -> Any:
    return torch.tensor(value) if isinstance(value, bool | int | float) else value


def arrays(value: Any) -> Any:
    return numpy.array(value) if isinstance(value, bool | int | float) else value


KINDS = [of_numpy, of_torch, arrays]


def gradients(step: int) -> list[torch.Tensor]:
    return [made_up("gaussian", shape, step, i).float() for i, shape in enumerate(SHAPES)]


def made(kind: Any, **options: Any) -> Any:
    form = {"momentum_form": "sgd"} if "nesterov" in options else {}
    return kind([p.requires_grad_() for p in gradients(0)], **options, **form)


def trained(optimizer: Any) -> Any:
    for step in range(1, 4):
        step_with([optimizer], [gradients(step)])
    states = [dict(optimizer.state[p]) for p in parameters_of(optimizer)]
    return bits([parameters_of(optimizer), states])


def plain_settings(optimizer: Any) -> list[dict[str, Any]]:
    """The groups, as they come out of a file that may have plain data only."""
    groups = through_a_file(optimizer.state_dict())["param_groups"]
    for group in groups:
        for name, value in group.items():
            if name not in ("params", "per_parameter"):
                assert value is None or type(value) in (bool, int, float, str, torch.Tensor), name
    return bits(groups)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_constructor_takes_them(name: str, kind: Callable[[Any], Any]) -> None:
    optimizer, options = OPTIMIZERS[name]
    given = {key: kind(value) for key, value in options.items()}
    first, second = made(optimizer, **options), made(optimizer, **given)
    assert trained(second) == trained(first)
    if kind is not of_torch:  # an SGD's tensors stay tensors
        assert plain_settings(second) == plain_settings(first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_group_takes_them_between_steps(name: str, kind: Callable[[Any], Any]) -> None:
    optimizer, options = OPTIMIZERS[name]
    first, second = made(optimizer, **options), made(optimizer, **options)
    for each in (first, second):
        step_with([each], [gradients(7)])
    for key, value in second.param_groups[0].items():
        if key in options:
            second.param_groups[0][key] = kind(value)
    if "rank" in options:
        first.param_groups[0]["per_parameter"] = {"rank": [1, None, 3]}
        second.param_groups[0]["per_parameter"] = {"rank": [kind(1), None, kind(3)]}
    assert trained(second) == trained(first)
    if kind is not of_torch:
        assert plain_settings(second) == plain_settings(first)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compressor", EVERY_COMPRESSOR, ids=repr)
def test_a_compressor_takes_them(compressor: Any, kind: Callable[[Any], Any]) -> None:
    own = {
        each.name: getattr(compressor, each.name)
        for each in dataclasses.fields(compressor)
        if each.init
    }
    # Shares of the elements that are exact.
    own |= {"density": 0.125} if own.get("density") is not None else {}
    given = type(compressor)(**{name: kind(value) for name, value in own.items()})
    plain = type(compressor)(**own)
    options = {"lr": 0.125, "error_feedback": False}
    first, second = (made(ErrorFeedbackSGD, compressor=each, **options) for each in (plain, given))
    assert trained(second) == trained(first)
    assert plain_settings(second) == plain_settings(first)
    for shape in SHAPES:
        assert second.compressor.payload_bytes([shape]) == first.compressor.payload_bytes([shape])


POLICIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Uniform": (Uniform, {"value": 2}),
    "Accordion": (
        Accordion,
        {"low": 1, "high": 3, "threshold": 0.25, "interval": 1, "lr_fall": 0.5, "sketch": 64},
    ),
    "LGreCo": (
        LGreCo,
        {
            "reference": 2,
            "shrink": 0.5,
            "grow": 1.5,
            "tolerance": 1.25,
            "observations": 1,
            "interval": 1,
            "iterations": 1,
            "sketch": 64,
        },
    ),
    "CommunicationBudget": (
        CommunicationBudget,
        {"bytes_per_step": 500, "max_rank": 3, "interval": 1},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_takes_them(name: str, kind: Callable[[Any], Any]) -> None:
    policy, options = POLICIES[name]
    outcomes = []
    for own in (options, {key: kind(value) for key, value in options.items()}):
        optimizer = made(PowerSGDOptimizer, lr=0.1)
        scheduler = RankScheduler(optimizer, policy(**own))
        found = []
        for _ in range(3):
            found.append(trained(optimizer))
            scheduler.step()
        saved = bits(through_a_file(scheduler.state_dict()))
        outcomes.append((found, saved, scheduler.get_last_ranks(), plain_settings(optimizer)))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_calls_take_them(kind: Callable[[Any], Any]) -> None:
    first, second = (made(PowerSGDOptimizer, lr=0.1) for _ in range(2))
    for optimizer, convert in ((first, lambda value: value), (second, kind)):
        optimizer.weight = convert(0.5)
        optimizer.broadcast_parameters(convert(0))
        broadcast_buffers(torch.nn.BatchNorm1d(3), convert(0))
        Network(convert(0.5), convert(0.25)).seconds(convert(8), convert(2))
        StepTime(compression=convert(False), repeats=convert(1))
    assert second.weight == 0.5
    assert type(second.weight) is float
    assert trained(second) == trained(first)
    pair = [made(PowerSGDOptimizer, lr=0.1) for _ in range(2)]
    assert lockstep([each.exchange(kind(2), kind(w)) for w, each in enumerate(pair)]).results
    assert type(pair[0].param_groups[0]["world_size"]) is int


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_of_laws_takes_them(kind: Callable[[Any], Any]) -> None:
    def trial(convert: Callable[[Any], Any]) -> Trial:
        sizes, shapes = [convert(1), convert(2)], [(convert(4), convert(5)), (convert(3),)]
        rest = (convert(2), convert(1), convert(0), convert(True))
        return Trial(RandomK(density=0.25), sizes, shapes, *rest)

    assert trial(kind) == trial(lambda value: value)
    assert hash(trial(kind).fewest_and_most) == hash((1, 2))
