"""What one worker of `test_processes.py` does. Run by torchrun, or with its environment variables.

    python process_worker.py agree RESULTS    trains, then disagrees in two ways, and says what came
    python process_worker.py die RESULTS      worker 1 dies in mid-step; the others say what came

Each worker writes RESULTS/worker.json.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efsgd import PowerSGDOptimizer
from efsgd.agreement import checksum
from efsgd.checkpoint import consolidated_state_dict
from efsgd.collectives import Collective
from efsgd.transports import ProcessGroup

SHAPES = [(24, 16), (16,), (24, 16), (8, 3, 3, 3), (40, 30)]
OPTIONS: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01, "rank": 2}


def start() -> list[Tensor]:
    """Initial parameters, the same for everyone."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients(step: int, worker: int) -> list[Tensor | None]:
    """Made-up gradients of one worker; now and then it has none for some parameter."""
    generator = torch.Generator().manual_seed(1000 * step + worker)
    made: list[Tensor | None] = [torch.randn(shape, generator=generator) for shape in SHAPES]
    made[step % len(SHAPES)] = None if (step + worker) % 3 == 0 else made[step % len(SHAPES)]
    return made


def set_gradients(optimizer: PowerSGDOptimizer, step: int, worker: int) -> None:
    """Gives the optimizer's parameters their gradients."""
    parameters = optimizer.param_groups[0]["params"]
    for parameter, gradient in zip(parameters, gradients(step, worker), strict=True):
        parameter.grad = gradient


def make(parameters: list[Tensor], **options: Any) -> PowerSGDOptimizer:
    """An optimizer over its own copy of `parameters`."""
    own = [parameter.clone().requires_grad_() for parameter in parameters]
    return PowerSGDOptimizer(own, **{**OPTIONS, **options})


def fingerprint(optimizer: PowerSGDOptimizer) -> dict[str, list[int]]:
    """Checksums of parameters and of each kind of state."""
    found: dict[str, list[int]] = {}
    for parameter in optimizer.param_groups[0]["params"]:
        found.setdefault("parameters", []).append(checksum(parameter.detach()))
        for name, value in sorted(optimizer.state[parameter].items()):
            found.setdefault(name, []).append(checksum(value.contiguous()))
    return found


def error_of(action: Any) -> dict[str, Any]:
    """Runs `action`, which should fail: with what, and after how many seconds."""
    began = time.monotonic()
    try:
        action()
    except Exception as error:
        seconds = time.monotonic() - began
        return {"type": type(error).__name__, "text": str(error), "seconds": seconds}
    return {"type": None, "text": "", "seconds": time.monotonic() - began}


def agree(worker: int, world_size: int) -> dict[str, Any]:
    """Trains for 50 steps, then meets other workers with other ideas."""
    results: dict[str, Any] = {}
    optimizer = make(start())
    for step in range(50):
        set_gradients(optimizer, step, worker)
        optimizer.step()
        if step == 4:
            parameters = optimizer.param_groups[0]["params"]
            results["values"] = [p.detach().flatten().tolist() for p in parameters]
    results["trained"] = fingerprint(optimizer)
    results["stats"] = optimizer.communication_stats()
    consolidated = consolidated_state_dict(optimizer)["state"]
    results["mean_errors"] = [checksum(state["error"]) for state in consolidated.values()
                              if "error" in state]  # fmt: skip

    is_odd_one = worker == world_size - 1
    other = make([*start()[:4], torch.zeros(40, 31)] if is_odd_one else start())
    for parameter in other.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    results["other_shape"] = error_of(other.step)

    shorter = make(start()[:4] if is_odd_one else start())
    results["fewer_parameters"] = error_of(shorter.step)

    other_rank = make(start(), rank=3 if is_odd_one else 2)
    results["other_rank"] = error_of(other_rank.step)

    apart = make([p + (0.001 if is_odd_one and i == 2 else 0) for i, p in enumerate(start())])
    before = fingerprint(apart)
    set_gradients(apart, 0, worker)
    results["other_values"] = error_of(apart.step)
    results["untouched"] = fingerprint(apart) == before
    apart.broadcast_parameters()
    apart.step()
    results["after_broadcast"] = fingerprint(apart)["parameters"]

    if world_size == 4:  # two groups of two workers, each an optimizer of its own
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        half = make(start(), process_group=groups[worker // 2])
        set_gradients(half, 0, worker)
        half.step()
        results["subgroup"] = fingerprint(half)["parameters"]
        outsider = make(start(), process_group=groups[1 - worker // 2])
        results["outsider"] = error_of(outsider.step)
    return results


def die(worker: int, world_size: int) -> dict[str, Any]:
    """Worker 1 dies while the second collective of step 3 is on its way."""
    optimizer = make(start())
    for step in range(3):
        set_gradients(optimizer, step, worker)
        optimizer.step()
    set_gradients(optimizer, 3, worker)
    before = fingerprint(optimizer)
    if worker == 1:
        begin, calls = ProcessGroup.start, []

        def fatal(self: ProcessGroup, collective: Collective) -> Any:
            calls.append(collective)
            if len(calls) == 2:
                os._exit(3)
            return begin(self, collective)

        ProcessGroup.start = fatal  # type: ignore[method-assign]
    results = {"error": error_of(optimizer.step)}
    results["untouched"] = {"same": fingerprint(optimizer) == before}
    return results


def main() -> None:
    """Entry point."""
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    worker, world_size = dist.get_rank(), dist.get_world_size()
    results = {"agree": agree, "die": die}[task](worker, world_size)
    (folder / f"{worker}.json").write_text(json.dumps(results))
    if task == "agree":
        dist.destroy_process_group()
    else:
        os._exit(0)  # the group is broken: nothing is left to be said goodbye to


if __name__ == "__main__":
    main()
