"""A step under torch's FakeTensorMode, as estimators of memory take it: shapes without values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    GradientAverager,
    Identity,
    PowerSGD,
    PowerSGDOptimizer,
    PowerSGDPlus,
    SignNorm,
    Signum,
    TopK,
    UniformQuantized,
)
from efsgd.layout import is_fake
from tests.simulation import bits

COMPRESSORS = [
    Identity(),
    PowerSGD(rank=2),
    PowerSGD(rank=2, alternating=True),
    PowerSGDPlus(rank=2, refresh_every=2),
    LQSGD(rank=2),
    TopK(density=0.1),
    SignNorm(),
    UniformQuantized(),
]  # others draw what they send, from values
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


def trained(make: Callable[[Any], Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Linear(16, 12)
    optimizer = make(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 16)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.filterwarnings("error:.*data pointer")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_need_no_values(name: str) -> None:
    expected = trained(OPTIMIZERS[name])
    with FakeTensorMode():
        model, optimizer = trained(OPTIMIZERS[name])
    for fake, real in zip(model.parameters(), expected[0].parameters(), strict=True):
        kept, known = optimizer.state[fake], expected[1].state[real]
        assert is_fake(kept.get("error", fake))
        assert {k: (v.shape, v.dtype) for k, v in kept.items()} == {
            k: (v.shape, v.dtype) for k, v in known.items()
        }
    assert (
        optimizer.communication_stats()["bytes_sent"]
        == (expected[1].communication_stats()["bytes_sent"])
    )
    # Nothing without values is left behind in what is made once in a process.
    again = trained(OPTIMIZERS[name])
    assert bits(list(again[0].parameters())) == bits(list(expected[0].parameters()))


@pytest.mark.parametrize("name", ["Signum", repr(SignNorm()), repr(LQSGD(rank=2))])
def test_what_is_made_once_in_a_process_has_values(name: str) -> None:
    from efsgd.algorithms.quantization import log_quantizer
    from efsgd.wire import bits as packed

    packed._spread_bytes.cache_clear()
    log_quantizer._table.cache_clear()
    with FakeTensorMode():
        trained(OPTIMIZERS[name])
    trained(OPTIMIZERS[name])
