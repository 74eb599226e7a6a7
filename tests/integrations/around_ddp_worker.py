"""What one worker of `test_around_ddp.py` does with the model, under torchrun.

    python around_ddp_worker.py RESULTS

Each worker writes RESULTS/worker.json.
"""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.profiler import ProfilerActivity, profile

import efsgd
from efsgd import PowerSGDOptimizer
from tests.integrations.around_ddp_loops import LOOPS
from tests.integrations.around_ddp_training import (
    HIDDEN,
    OPTIONS,
    batch,
    fingerprint,
    local_gradients,
    loss_of,
    make_model,
    make_optimizer,
    parameters_of,
    plain_ddp,
    quiet_ddp,
    train,
    values,
)
from tests.wire.process_worker import error_of, join

with warnings.catch_warnings():  # of its own use of torch.jit
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward

BACKENDS = {name: CompileCounterWithBackend(name) for name in ("eager", "aot_eager")}


def compiled(backend: str) -> Callable[[nn.Module], nn.Module]:
    """A wrapper that has torch.compile trace the model, with a backend that needs no compiler."""

    def wrap(model: nn.Module) -> nn.Module:
        torch.compiler.reset()
        return torch.compile(model, backend=BACKENDS[backend])

    return wrap


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "noop_hook": quiet_ddp,
    "bucket views": lambda model: quiet_ddp(model, gradient_as_bucket_view=True),
    "find_unused_parameters": lambda model: quiet_ddp(model, find_unused_parameters=True),
    "static_graph": lambda model: quiet_ddp(model, static_graph=True),
    "compiled, eager": compiled("eager"),
    "compiled, aot_eager": compiled("aot_eager"),
    "compiled under noop_hook": lambda model: quiet_ddp(compiled("aot_eager")(model)),
    "noop_hook, compiled": lambda model: compiled("aot_eager")(quiet_ddp(model)),
}


def variants(worker: int) -> dict[str, Any]:
    """The same training with the model wrapped in every way that leaves gradients local."""
    trained, graphs = {}, {}
    for name, wrap in VARIANTS.items():
        before = sum(backend.frame_count for backend in BACKENDS.values())
        trained[name] = fingerprint(train(wrap, worker))
        graphs[name] = sum(backend.frame_count for backend in BACKENDS.values()) - before
    trained["no_sync"] = fingerprint(train(plain_ddp, worker, no_sync=True))
    return {"trained": trained, "graphs": graphs}


def collectives_in(action: Callable[[], Any]) -> dict[str, int]:
    """The collectives that torch is asked for meanwhile, by name, whoever asks."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        action()
    prefix = "c10d::"
    counts = {event.key: event.count for event in profiler.key_averages()}
    return {key.removeprefix(prefix): n for key, n in counts.items() if key.startswith(prefix)}


def traffic(worker: int) -> dict[str, Any]:
    """Who communicates when: in the backward passes of a step's micro-batches, or in `step()`."""
    found: dict[str, Any] = {}
    for name, wrap, no_sync in [
        ("plain", VARIANTS["plain"], False),
        ("noop_hook", quiet_ddp, False),
        ("no_sync", plain_ddp, True),
        ("averaging DDP", plain_ddp, False),
    ]:
        model = make_model()
        wrapped, optimizer = wrap(model), make_optimizer(model)
        with warnings.catch_warnings():  # of gradients that were averaged: see `averaged_twice`
            warnings.filterwarnings("ignore", "All workers have bitwise equal gradients")
            for step in range(2):  # the first has the workers compare what they train
                optimizer.zero_grad()
                of_gradients = collectives_in(
                    lambda: local_gradients(wrapped, worker, step, no_sync=no_sync)  # noqa: B023
                )
                of_step = collectives_in(optimizer.step)
        stats = optimizer.communication_stats()
        found[name] = {"backward": of_gradients, "step": of_step, "stats": stats}
    return found


class Branches(nn.Module):
    """One branch that every worker uses, one that worker 1 uses only now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.branch = make_model(), make_model()

    def forward(self, inputs: Tensor, has_branch: bool) -> Tensor:
        outputs: Tensor = self.trunk(inputs)
        return outputs + self.branch(inputs) if has_branch else outputs


def unused(worker: int) -> dict[str, Any]:
    """A branch that in some steps one worker, and in some steps nobody has gradients for."""
    found: dict[str, Any] = {}
    for name in ("plain", "find_unused_parameters"):
        model = Branches()
        wrapped = model if name == "plain" else quiet_ddp(model, find_unused_parameters=True)
        optimizer = make_optimizer(model)
        for step in range(6):
            has_branch = step % 3 == 0 or (step % 3 == 1 and worker == 0)
            optimizer.zero_grad()
            before = values(model.branch.parameters())
            wrapped(batch(worker, step), has_branch).square().mean().backward()
            optimizer.step()
            if step == 1:
                found[name + ", moved"] = before != values(model.branch.parameters())
            if step == 2:
                found[name + ", rested"] = before == values(model.branch.parameters())
                found[name + ", gradient"] = model.branch[0].weight.grad is not None
        found[name] = fingerprint(optimizer)
    return found


def buffers(worker: int) -> dict[str, Any]:
    """BatchNorm's statistics in a plain model, under DDP, and within no_sync."""
    found: dict[str, Any] = {}
    for name, wrap in [
        ("plain", VARIANTS["plain"]),
        ("noop_hook", quiet_ddp),
        ("no_sync", plain_ddp),
    ]:
        norm = nn.BatchNorm1d(HIDDEN)
        model = make_model(norm)
        wrapped, optimizer = wrap(model), make_optimizer(model)
        with wrapped.no_sync() if name == "no_sync" else contextlib.nullcontext():
            for number in range(3 + worker if name == "plain" else 3):
                loss_of(wrapped, batch(worker, number)).backward()
            optimizer.step()
            found[name] = reported(norm)
            wrapped(batch(worker, 9))
            found[name + ", one batch later"] = reported(norm)
            found[name + ", of that batch"] = model[0](batch(worker, 9)).mean(0).tolist()
        efsgd.average_buffers(model)
        found[name + ", averaged"] = reported(norm)
    return found


def reported(module: nn.Module) -> dict[str, Any]:
    return {name: buffer.tolist() for name, buffer in module.named_buffers()}


def averaged_twice(worker: int) -> dict[str, Any]:
    """DDP as it comes: it averages, and so does the optimizer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = train(lambda model: plain_ddp(model.double()), worker)
    texts = [
        str(warning.message) for warning in caught if "equal gradients" in str(warning.message)
    ]
    remedied = train(lambda model: quiet_ddp(model.double()), worker)
    return {
        "warnings": texts,
        "parameters": values(parameters_of(optimizer)),
        "remedied": values(parameters_of(remedied)),
    }


def refusals(worker: int) -> dict[str, Any]:
    """Wrappers that give a worker less than its whole gradients or parameters."""
    options = {**OPTIONS, "lr": 0.1}

    def with_zero() -> None:
        model = make_model()
        zero = ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=PowerSGDOptimizer, **options
        )
        loss_of(model, batch(worker, 0)).backward()
        zero.step()

    def in_backward() -> None:
        model = make_model()
        _apply_optimizer_in_backward(PowerSGDOptimizer, model.parameters(), options)
        loss_of(model, batch(worker, 0)).backward()

    def with_fully_shard() -> None:
        model = make_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        make_optimizer(model)

    def with_fsdp(*, use_orig_params: bool) -> None:
        cpu = torch.device("cpu")
        model = FullyShardedDataParallel(
            make_model(), device_id=cpu, use_orig_params=use_orig_params
        )
        optimizer = make_optimizer(model)
        loss_of(model, batch(worker, 0)).backward()
        optimizer.step()

    return {
        "ZeroRedundancyOptimizer": error_of(with_zero),
        "_apply_optimizer_in_backward": error_of(in_backward),
        "fully_shard": error_of(with_fully_shard),
        "FSDP, flat parameters": error_of(lambda: with_fsdp(use_orig_params=False)),
        "FSDP, original parameters": error_of(lambda: with_fsdp(use_orig_params=True)),
    }


TASKS: list[Callable[[int], dict[str, Any]]] = [
    variants, traffic, unused, buffers, averaged_twice, *LOOPS, refusals
]  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    worker, _ = join()
    results = {task.__name__: task(worker) for task in TASKS}
    dist.destroy_process_group()
    (Path(sys.argv[1]) / f"{worker}.json").write_text(json.dumps(results))
    # torch.compile and FSDP keep threads of the group alive, which may abort a process at its exit.
    os._exit(0)


if __name__ == "__main__":
    main()
