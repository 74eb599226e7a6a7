"""What one worker of `test_attach_to_ddp.py` does.

    python attach_ddp_worker.py RESULTS

Each worker writes RESULTS/worker.json.
"""

import copy
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

import efsgd
from tests.integrations.programs_worker import checksums
from tests.integrations.threads import Model, loss_of
from tests.simulation import through_a_file
from tests.wire.process_worker import error_of

COMPRESSOR = efsgd.PowerSGD(rank=2)


def make(
    *, wraps: bool = True, seed: int = 0, **options: Any
) -> tuple[Any, nn.Module, torch.optim.Optimizer, efsgd.Attached]:
    """What is called, the model in it, an optimizer of two groups, and what is attached."""
    model = Model(seed)
    called = DistributedDataParallel(model, find_unused_parameters=True) if wraps else model
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    return called, model, optimizer, efsgd.attach(called, optimizer, COMPRESSOR, **options)


def train(called: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(called, dist.get_rank(), step).backward()
        nn.utils.clip_grad_norm_(called.parameters(), 1e-9)  # AdamW divides by it again, almost
        optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[int]]:
    state = optimizer.state_dict()
    kept = {name: checksums(value) for name, value in state.items()}
    return {"parameters": checksums(list(model.parameters())), **kept}


def resumes() -> dict[str, Any]:
    """A run, the same resumed under DDP, and resumed without it."""
    called, model, optimizer, _ = make(seed=dist.get_rank())
    train(called, optimizer, range(3))
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    ends = {}
    train(called, optimizer, range(3, 6))
    ends["whole"] = state_of(model, optimizer)
    for wraps in (True, False):
        called, model, optimizer, attached = make(wraps=wraps)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))  # torch's Adam would share its steps
        for step in range(3, 6):
            optimizer.zero_grad()
            loss_of(called, dist.get_rank(), step).backward()
            attached.average_()  # does nothing where the backward pass has done it
            nn.utils.clip_grad_norm_(called.parameters(), 1e-9)
            optimizer.step()
        ends["wrapped" if wraps else "plain"] = state_of(model, optimizer)
    return ends


def scaled() -> dict[str, Any]:
    """With a scaler that is told of, where worker 1 overflows; and without telling."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    called, model, optimizer, attached = make(scaler=scaler)
    for step in range(10, 15):
        optimizer.zero_grad()
        factor = torch.inf if step == 12 and dist.get_rank() == 1 else 1.0
        scaler.scale(factor * loss_of(called, dist.get_rank(), step)).backward()
        scaler.step(optimizer)
        scaler.update()
    found = {"scaled": state_of(model, optimizer), "scale": scaler.get_scale()}
    found["stats"] = attached.metrics()
    called, model, optimizer, _ = make()
    for step in (10, 11, 13, 14):
        optimizer.zero_grad()
        loss_of(called, dist.get_rank(), step).backward()
        optimizer.step()
    found["unscaled"] = state_of(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss_of(called, dist.get_rank(), 15)).backward()
    found["untold"] = error_of(lambda: scaler.step(optimizer))
    return found


def skipped() -> dict[str, Any]:
    called, model, optimizer, attached = make(nonfinite="skip")
    train(called, optimizer, range(3))
    before = state_of(model, optimizer)
    optimizer.zero_grad()
    factor = torch.nan if dist.get_rank() == 1 else 1.0
    (factor * loss_of(called, dist.get_rank(), 3)).backward()
    averages = attached.average_()
    optimizer.step()
    stays = state_of(model, optimizer) == before
    has_gradients = model.side.weight.grad is not None
    train(called, optimizer, range(4, 6))
    moves = state_of(model, optimizer) != before
    return {
        "averages": averages,
        "stays": stays,
        "has_gradients": has_gradients,
        "moves": moves,
        "parameters": checksums(list(model.parameters())),
    }


def detached() -> dict[str, Any]:
    called, model, optimizer, attached = make()
    train(called, optimizer, range(2))
    before = attached.communication_stats()["steps"]
    attached.detach()
    optimizer.zero_grad()
    loss_of(called, dist.get_rank(), 3).backward()
    own = Model()
    own.load_state_dict(model.state_dict())
    loss_of(own, dist.get_rank(), 3).backward()
    differences = []
    for mine, averaged in zip(own.parameters(), model.parameters(), strict=True):
        if mine.grad is not None and averaged.grad is not None:
            dist.all_reduce(mine.grad)
            differences.append(float((mine.grad / 2 - averaged.grad).abs().max()))
    optimizer.step()
    return {
        "steps": attached.communication_stats()["steps"] - before,
        "difference": max(differences),
        "keys": sorted(optimizer.state_dict()),
    }


def refusals() -> dict[str, Any]:
    def with_another_hook() -> None:
        model = DistributedDataParallel(Model())
        model.register_comm_hook(None, noop_hook)
        efsgd.attach(model, torch.optim.AdamW(model.parameters()))

    def of_a_part() -> None:
        model = DistributedDataParallel(Model())
        efsgd.attach(model, torch.optim.AdamW(model.module.side.parameters()))

    def of_more() -> None:
        model, other = DistributedDataParallel(Model()), nn.Linear(2, 2)
        efsgd.attach(model, torch.optim.AdamW([*model.parameters(), *other.parameters()]))

    def with_a_group() -> None:
        model = DistributedDataParallel(Model())
        group = dist.group.WORLD
        efsgd.attach(model, torch.optim.AdamW(model.parameters()), process_group=group)

    def with_more_later() -> None:
        called, _, optimizer, _ = make()
        optimizer.add_param_group({"params": nn.Linear(2, 2).parameters()})
        loss_of(called, dist.get_rank(), 0).backward()
        optimizer.step()

    def after_no_sync() -> None:
        called, _, optimizer, _ = make()
        train(called, optimizer, range(1))
        with called.no_sync():
            loss_of(called, dist.get_rank(), 0).backward()
        optimizer.step()

    def averaged_twice() -> None:
        model = Model()
        called = DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.AdamW(model.parameters())
        efsgd.attach(model, optimizer, COMPRESSOR)  # and not what is called
        loss_of(called, dist.get_rank(), 0).backward()
        optimizer.step()

    cases: list[Callable[[], None]] = [with_another_hook, of_a_part, of_more, with_a_group]
    cases += [with_more_later, after_no_sync]
    found: dict[str, Any] = {case.__name__: error_of(case) for case in cases}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        averaged_twice()
    found["averaged_twice"] = [str(each.message) for each in caught]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report = {task.__name__: task() for task in (resumes, scaled, skipped, detached, refusals)}
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()
