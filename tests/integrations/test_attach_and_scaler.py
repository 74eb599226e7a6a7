"""efsgd.attach under torch.amp.GradScaler, without DistributedDataParallel."""

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from efsgd import PowerSGD, attach
from tests.integrations.threads import (
    WORKERS,
    Model,
    all_equal,
    loss_of,
    parameters,
    together,
)
from tests.simulation import bits
from tests.wire.test_transports import Threads

COMPRESSOR = PowerSGD(rank=2)
OVERFLOWS = 2  # the step in which worker 1 does
CLIP = 0.01


def adamw(model: nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)


def run(
    workers: Threads, *, scaled: bool = True, gives: bool = True, clips: bool = False, fused: bool
) -> Any:
    """What a training loop comes to, and the scale at its end."""
    model = Model()
    optimizer = adamw(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3, enabled=scaled)
    given = scaler if gives else None
    attached = attach(model, optimizer, COMPRESSOR, scaler=given, process_group=workers)
    for step in range(6):
        overflows = step == OVERFLOWS and workers.worker == 1
        if step == OVERFLOWS and not scaled:
            continue
        optimizer.zero_grad()
        loss = loss_of(model, workers.worker, 10 + step)
        scaler.scale(loss * torch.inf if overflows else loss).backward()
        if clips:
            if scaled:
                scaler.unscale_(optimizer)
            else:
                attached.average_()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        before = parameters(model)
        scaler.step(optimizer)
        assert (parameters(model) == before) == (step == OVERFLOWS)
        scaler.update()
    stats = attached.communication_stats()
    assert (stats["steps"], stats["skipped_steps"]) == (5, int(scaled))
    return parameters(model), bits(attached.averager.state_dict()["state"]), scaler.get_scale()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("way", ["stepped", "told", "told and clipped"])
def test_all_skip_the_overflow_of_one_and_the_rest_is_as_without_a_scaler(
    fused: bool, way: str
) -> None:
    clips = way == "told and clipped"
    gives = way != "stepped"
    scaled = together(lambda w: run(w, gives=gives, clips=clips, fused=fused))
    plain = together(lambda w: run(w, scaled=False, clips=clips, fused=fused))
    assert [end[:2] for end in scaled] == [end[:2] for end in plain]
    assert all_equal([end[0] for end in scaled])
    if clips or (gives and not fused):  # the scaler has seen means: scales are equal, too
        assert [end[2] for end in scaled] == [2.0**10] * WORKERS  # halved once, doubled once


def test_unscaling_and_clipping_local_gradients_is_noticed() -> None:
    with pytest.warns(UserWarning, match="pass scaler=scaler"):
        together(lambda workers: run(workers, gives=False, clips=True, fused=False))


def test_averaging_scaled_gradients_unbeknown_is_refused_on_all_workers() -> None:
    def program(workers: Threads) -> None:
        model = Model()
        optimizer, scaler = adamw(model), torch.amp.GradScaler("cpu", init_scale=8.0)
        attached = attach(model, optimizer, COMPRESSOR, process_group=workers)
        scaler.scale(loss_of(model, workers.worker, 0)).backward()
        attached.average_()
        with pytest.raises(RuntimeError, match=r"attach\(\.\.\., scaler=scaler\)"):
            scaler.step(optimizer)

    together(program)


def test_two_optimizers_share_a_scaler_and_end_in_any_order() -> None:
    for order in ((0, 1), (1, 0)):
        model, scaler = Model(), torch.amp.GradScaler("cpu", init_scale=8.0)
        halves = [[*model.side.parameters()], [*model.first.parameters()]]
        optimizers = [torch.optim.AdamW(half, lr=0.01) for half in halves]
        attached = [attach(model, o, COMPRESSOR, scaler=scaler) for o in optimizers]
        for _ in range(2):
            scaler.scale(loss_of(model, 0, 0)).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
        assert [each.communication_stats()["steps"] for each in attached] == [2, 2]
        attached[order[0]].detach()
        scaler.scale(loss_of(model, 0, 0)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        attached[order[1]].detach()
        steps = [attached[which].communication_stats()["steps"] for which in order]
        assert steps == [2, 3]
        scaler.scale(loss_of(model, 0, 0)).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        assert [attached[which].communication_stats()["steps"] for which in order] == [2, 3]


def test_a_scaler_that_is_saved_leaves_the_averaging_behind() -> None:
    model = Model()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    attached = attach(model, adamw(model), COMPRESSOR, scaler=scaler)
    again = pickle.loads(pickle.dumps(scaler))
    other = Model()
    optimizer = adamw(other)
    again.scale(loss_of(other, 0, 0)).backward()
    scaled = [p.grad.clone() for p in other.parameters() if p.grad is not None]
    again.unscale_(optimizer)
    unscaled = [p.grad for p in other.parameters() if p.grad is not None]
    assert all(torch.equal(a / 4, b) for a, b in zip(scaled, unscaled, strict=True))
    assert attached.communication_stats()["steps"] == 0
