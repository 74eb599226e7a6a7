"""D2, D3, D7 to D9, D11: checkpoints."""

import copy
import io
import pickle
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import StepLR

from benchmarks.contract.adapters import Adapter
from benchmarks.contract.made import given, noise
from benchmarks.contract.probes.copies import require_same_continuation, trained
from benchmarks.contract.probes.rules import sgd_twin
from benchmarks.contract.questions import Missed, NotProbed, describe_error, require, row

__all__: list[str] = []


@row(
    "D2",
    "Loading leaves the dict alone, refuses what does not fit, keeps dtypes",
    "The loaded dict is as it was, and what was loaded equals it; a dict with another number of "
    "parameters is a ValueError; state of bfloat16 parameters has its dtypes afterwards.",
)
def loading(adapter: Adapter) -> None:
    first, second = trained(adapter), trained(adapter, steps=1)
    saved = first.optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    second.optimizer.load_state_dict(saved)
    loaded = second.optimizer.state_dict()["state"]
    for index, kept in before.items():
        for name, value in kept.items():
            for state in (saved["state"], loaded):
                equal = torch.equal(torch.as_tensor(value), torch.as_tensor(state[index][name]))
                require(equal, f"{name} is not what it was")
    other = adapter.optimizer(given((12, 10)).parameters())
    try:
        other.load_state_dict(saved)
        raise Missed("a dict with other parameters is loaded")
    except ValueError:
        pass
    half = given((12, 10), dtype=torch.bfloat16)
    optimizers = [adapter.optimizer(half.parameters(), momentum=0.9) for _ in range(2)]
    for optimizer in optimizers:  # alone: what compresses beside it is not asked here
        half.weights[0].grad = torch.ones_like(half.weights[0])
        optimizer.step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    dtypes = [
        {k: v.dtype for k, v in optimizer.state[half.weights[0]].items() if isinstance(v, Tensor)}
        for optimizer in optimizers
    ]
    require(dtypes[0] == dtypes[1], f"dtypes {dtypes[0]} become {dtypes[1]}")


@row(
    "D3",
    "What an SGD's or an older dict lacks is filled in",
    "An SGD's state_dict without maximize, foreach, differentiable, fused and nesterov; a step.",
)
def older_dicts(adapter: Adapter) -> None:
    adapter.needs_sgd()
    sgd = sgd_twin(given(), momentum=0.9)
    sgd.train(noise(sgd.model, 0))
    saved = sgd.optimizer.state_dict()
    for group in saved["param_groups"]:
        for name in ("maximize", "foreach", "differentiable", "fused", "nesterov"):
            del group[name]
    loop = adapter.loop(given(), momentum=0.9)
    loop.optimizer.load_state_dict(saved)
    loop.train(noise(loop.model, 1))


@row(
    "D7",
    "A checkpoint that `weights_only=True` reads continues the run",
    "Each of two workers saves what the documentation says to save, and the model; read with "
    "torch.load's default, a loop that was made anew makes the same four steps, to 1e-6.",
    workers=2,
)
def resumed(adapter: Adapter) -> None:
    part = dist.get_rank()
    model = given()
    loop = adapter.loop(model, momentum=0.9)
    for step in range(5):
        loop.train(noise(model, step, part))
    file, refusal = io.BytesIO(), ""
    torch.save({**loop.checkpoint(), "model": model.state_dict()}, file)
    for weights_only in (True, False):
        file.seek(0)
        try:
            checkpoint = torch.load(file, weights_only=weights_only)
            break
        except pickle.UnpicklingError as error:
            refusal = f"{describe_error(error).split('.')[0]}"
    model = given(seed=5)
    model.load_state_dict(checkpoint.pop("model"))
    again = adapter.loop(model, momentum=0.9)
    again.restore(checkpoint)
    which = "with weights_only=False, too, the" if refusal else "the"
    require_same_continuation(loop, again, part, f"{refusal}{refusal and '; '}{which} resumed run")
    require(not refusal, refusal)


@row(
    "D8",
    "torch.distributed.checkpoint's state dicts",
    "`get_optimizer_state_dict` and `set_optimizer_state_dict`, as they are and flattened, on two "
    "workers, into an optimizer that has made no step: state is the same, keys are equal.",
    workers=2,
)
def distributed_checkpoint(adapter: Adapter) -> None:
    for flat in (False, True):
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        loop, fresh = trained(adapter), trained(adapter, steps=0)
        saved = get_optimizer_state_dict(loop.wrapped, loop.optimizer, options=options)
        keys: list[Any] = [None, None]
        dist.all_gather_object(keys, sorted(map(str, saved)))
        require(keys[0] == keys[1], "the workers' keys differ")
        before = copy.deepcopy(loop.optimizer.state_dict()["state"])
        set_optimizer_state_dict(fresh.wrapped, fresh.optimizer, saved, options=options)
        after = fresh.optimizer.state_dict()["state"]
        for index, kept in before.items():
            for name, value in kept.items():
                require(name in after[index], f"{name} is lost")
                equal = torch.equal(torch.as_tensor(value), torch.as_tensor(after[index][name]))
                require(equal, f"{name} is not what was saved")


@row(
    "D9",
    "FSDP2's sharded parameters: supported, or refused",
    "Three steps after `fully_shard` on two workers; or an error that speaks of sharding.",
    workers=2,
)
def sharded(adapter: Adapter) -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = given((12, 10), (16, 14))
    fully_shard(model, mesh=mesh)
    before = [p.to_local().detach().clone() for p in model.parameters()]
    try:
        loop = adapter.sharded(model, mesh)
    except NotProbed:
        raise
    except Exception as error:
        return _refusal(error)
    try:
        for step in range(3):
            loop.zero_grad()
            made = [torch.full(p.shape, 1.0 + step) for p in model.parameters()]
            loop.backward(list(made))
            loop.step()
    except Exception as error:
        return _refusal(error)
    for p, old in zip(model.parameters(), before, strict=True):
        require(bool(p.to_local().isfinite().all()), "NaN in the parameters")
        require(not torch.equal(p.to_local(), old), "a parameter did not move")
    return "supported"


def _refusal(error: Exception) -> str:
    about = str(error).lower()
    require("dtensor" in about or "shard" in about, describe_error(error))
    return f"refused: {describe_error(error)}"


@row(
    "D11",
    "Schedulers made before or after loading",
    "StepLR, saved and loaded with the optimizer; the learning rates are those of a run without "
    "interruption.",
)
def scheduler_and_loading(adapter: Adapter) -> None:
    loop = trained(adapter)
    scheduler = StepLR(loop.optimizer, 2, gamma=0.5)
    _rates(loop, scheduler, 3)
    saved = copy.deepcopy((loop.optimizer.state_dict(), scheduler.state_dict()))
    expected = _rates(loop, scheduler, 4)
    for is_before in (True, False):
        again = trained(adapter, steps=0)
        if is_before:
            scheduler = StepLR(again.optimizer, 2, gamma=0.5)
        again.optimizer.load_state_dict(saved[0])
        if not is_before:
            scheduler = StepLR(again.optimizer, 2, gamma=0.5)
            again.optimizer.load_state_dict(saved[0])  # the constructor has set a rate
        scheduler.load_state_dict(saved[1])
        found = _rates(again, scheduler, 4)
        require(found == expected, f"learning rates {found}, not {expected}")


def _rates(loop: Any, scheduler: Any, steps: int) -> list[float]:
    found = []
    for step in range(steps):
        loop.train(noise(loop.model, step))
        scheduler.step()
        found.append(loop.optimizer.param_groups[0]["lr"])
    return found
