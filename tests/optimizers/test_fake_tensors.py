"""A step under torch's FakeTensorMode, as estimators of memory take it: shapes without values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    GradientAverager,
    Identity,
    PowerSGD,
    PowerSGDOptimizer,
    PowerSGDPlus,
    RandomBlock,
    RandomK,
    SignNorm,
    Signum,
    SpectralAtomo,
    TopK,
    UniformQuantized,
)
from efsgd.compressors.top_k import FEW
from efsgd.layout import is_fake
from efsgd.testing import step_together
from tests.simulation import bits

COMPRESSORS = [
    Identity(),
    PowerSGD(rank=2),
    PowerSGD(rank=2, alternating=True),
    PowerSGDPlus(rank=2, refresh_every=2),
    LQSGD(rank=2),
    LQSGD(rank=2, aggregation="scatter"),
    TopK(density=0.1),
    TopK(density=0.1, scope="model"),
    SignNorm(),
    UniformQuantized(),
    RandomK(rank=2),
    RandomBlock(rank=2),
    SpectralAtomo(rank=2),
    SpectralAtomo(rank=2, sampling="rejection"),
]
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    **{
        repr(each): lambda p, each=each: ErrorFeedbackSGD(
            p, lr=0.1, momentum=0.9, compressor=each, max_grad_norm=1.0
        )
        for each in COMPRESSORS
    },
    "sgd": lambda p: PowerSGDOptimizer(p, lr=0.1, momentum=0.9, rank=2, momentum_form="sgd"),
    "Signum": Signum,
    "GradientAverager": GradientAverager,
}


def trained(make: Callable[[Any], Any], world_size: int = 1) -> tuple[list[Any], list[Any]]:
    """The models of some workers, which differ in their inputs, and their optimizers."""
    models = []
    for _ in range(world_size):
        torch.manual_seed(0)
        models.append(nn.Linear(16, 12))
    optimizers = [make(model.parameters()) for model in models]
    for _ in range(2):
        for worker, model in enumerate(models):
            optimizers[worker].zero_grad()
            model(torch.full((4, 16), 1.0 + worker)).square().mean().backward()
        step_together(optimizers) if world_size > 1 else optimizers[0].step()
    return models, optimizers


@pytest.mark.filterwarnings("error:.*data pointer")
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_need_no_values(name: str, world_size: int) -> None:
    expected = trained(OPTIMIZERS[name], world_size)
    with FakeTensorMode():
        found = trained(OPTIMIZERS[name], world_size)
    for own, known in zip(zip(*found, strict=True), zip(*expected, strict=True), strict=True):
        for fake, real in zip(own[0].parameters(), known[0].parameters(), strict=True):
            kept, values = own[1].state[fake], known[1].state[real]
            assert is_fake(kept.get("error", fake))
            assert {k: (v.shape, v.dtype) for k, v in kept.items()} == {
                k: (v.shape, v.dtype) for k, v in values.items()
            }
        reports = [optimizer.communication_stats() for optimizer in (own[1], known[1])]
        for report in reports:
            report.pop("grad_norm", None)
        assert repr(reports[0]) == repr(reports[1])  # a ratio may be nan
    # Nothing without values is left behind in what is made once in a process.
    again = trained(OPTIMIZERS[name], world_size)
    for model, same in zip(again[0], expected[0], strict=True):
        assert bits(list(model.parameters())) == bits(list(same.parameters()))


def test_nor_do_those_of_many_elements() -> None:
    """Of which Top K finds the largest otherwise."""
    with FakeTensorMode():
        parameter = nn.Parameter(torch.ones(2 * FEW))
        optimizer = ErrorFeedbackSGD([parameter], lr=0.1, compressor=TopK(density=0.01))
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert optimizer.communication_stats()["steps"] == 1


@pytest.mark.parametrize("missing", [0, 1])
def test_gradients_may_be_missing_and_settings_change(missing: int) -> None:
    with FakeTensorMode():
        models = [nn.Linear(16, 12) for _ in range(2)]
        optimizers = [PowerSGDOptimizer(model.parameters(), rank=2) for model in models]
        for step in range(3):
            for model, optimizer in zip(models, optimizers, strict=True):
                for position, parameter in enumerate(model.parameters()):
                    parameter.grad = None if position == missing else torch.ones_like(parameter)
                optimizer.param_groups[0]["rank"] = 2 + step // 2
            step_together(optimizers)
        assert optimizers[0].communication_stats()["steps"] == 3


def test_processes_of_a_group_without_network() -> None:
    """As estimators have it: torch's process group of one process that stands for four."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        with FakeTensorMode():
            _, (optimizer,) = trained(OPTIMIZERS["sgd"])
        assert optimizer.communication_stats()["steps"] == 2
        assert optimizer.communication_stats()["collectives"] == 2
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["Signum", repr(SignNorm()), repr(LQSGD(rank=2))])
def test_what_is_made_once_in_a_process_has_values(name: str) -> None:
    from efsgd.algorithms.quantization import log_quantizer
    from efsgd.wire import bits as packed

    packed._spread_bytes.cache_clear()
    log_quantizer._table.cache_clear()
    with FakeTensorMode():
        trained(OPTIMIZERS[name])
    trained(OPTIMIZERS[name])
