"""What one worker of `test_processes.py` does. Run by torchrun, or with its environment variables.

    python process_worker.py agree RESULTS    trains, then disagrees in two ways, and says what came
    python process_worker.py die RESULTS      worker 1 dies in mid-step; the others say what came
    python process_worker.py early RESULTS    makes and loads an optimizer before there is a group
    python process_worker.py alone RESULTS    makes calls on worker 0 only; both say what came

Each worker writes RESULTS/worker.json.
"""

import copy
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efsgd import PowerSGDOptimizer, average_buffers
from efsgd.audit import observe
from efsgd.checkpoint import average_errors_, consolidated_state_dict
from efsgd.wire import calls
from efsgd.wire.collectives import Collective
from efsgd.wire.compare import checksum
from efsgd.wire.transports import ProcessGroup

SHAPES = [(24, 16), (16,), (24, 16), (8, 3, 3, 3), (40, 30)]
THREADS = Path("/proc/self/task")
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


def join() -> tuple[int, int]:
    """Makes the group: this worker's number, and the number of workers."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    return dist.get_rank(), dist.get_world_size()


def threads_of_gloo() -> list[str]:
    """Names of the threads that serve process groups, as far as the system tells."""
    found = []
    for thread in THREADS.glob("*/comm"):
        try:
            found.append(thread.read_text().strip())
        except OSError:  # it has ended meanwhile
            continue
    return sorted(name for name in found if "gloo" in name)


def leave() -> dict[str, list[str]]:
    """Destroys the group: gloo's threads before and after that."""
    before = threads_of_gloo()
    dist.destroy_process_group()
    end = time.monotonic() + 5
    while (after := threads_of_gloo()) and time.monotonic() < end:
        time.sleep(0.01)  # the system may list a thread for a moment after it was joined
    return {"before": before, "after": after}


def agree() -> dict[str, Any]:
    """Trains for 50 steps, then meets other workers with other ideas."""
    # No optimizer is made before there is a group: what torch imports with it must not hold this.
    worker, world_size = join()
    results: dict[str, Any] = {}
    optimizer = make(start())
    recording = observe(optimizer, steps=range(20, 22))  # changes nothing of what follows
    for step in range(50):
        set_gradients(optimizer, step, worker)
        optimizer.step()
        if step == 4:
            parameters = optimizer.param_groups[0]["params"]
            results["values"] = [p.detach().flatten().tolist() for p in parameters]
    results["trained"] = fingerprint(optimizer)
    results["stats"] = optimizer.communication_stats()
    results["observed"] = [[m.step, m.worker, m.applied, m.nbytes] for m in recording]
    recording.close()
    consolidated = consolidated_state_dict(optimizer)["state"]
    results["mean_errors"] = [checksum(state["error"]) for state in consolidated.values()
                              if "error" in state]  # fmt: skip

    in_buckets = make(start(), bucket_bytes=1000)
    for step in range(200):
        set_gradients(in_buckets, step, worker)
        in_buckets.step()
    results["in_buckets"] = fingerprint(in_buckets)
    results["collectives_in_buckets"] = in_buckets.communication_stats()["collectives"]

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


def early() -> dict[str, Any]:
    """Trains an optimizer that was made and loaded before the group, beside one made after it."""
    alone = make(start())
    for step in range(3):
        set_gradients(alone, step, worker=0)
        alone.step()
    values = [p.detach() for p in alone.param_groups[0]["params"]]
    saved = copy.deepcopy(alone.state_dict())
    optimizers = {"early": make(values, rank=1)}
    optimizers["early"].load_state_dict(saved)
    worker, _ = join()
    optimizers["late"] = make(values, rank=1)
    optimizers["late"].load_state_dict(saved)
    for step in range(3, 8):
        for optimizer in optimizers.values():
            set_gradients(optimizer, step, worker)
            optimizer.step()
    results = {name: fingerprint(optimizer) for name, optimizer in optimizers.items()}
    return {**results, "start": fingerprint(alone)}


def die() -> dict[str, Any]:
    """Worker 1 dies while the second collective of step 3 is on its way."""
    worker, _ = join()
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

        ProcessGroup.start = fatal
    results = {"error": error_of(optimizer.step)}
    results["untouched"] = {"same": fingerprint(optimizer) == before}
    return results


def alone() -> dict[str, Any]:
    """Worker 0 makes a call, as in `if rank == 0:`, while worker 1 takes a step."""
    worker, world_size = join()
    calls.PATIENCE = timedelta(seconds=0.5)
    model = torch.nn.BatchNorm1d(4)
    made: dict[str, Callable[[PowerSGDOptimizer, Any], object]] = {
        "consolidated_state_dict()": lambda optimizer, _: consolidated_state_dict(optimizer),
        "average_errors_()": lambda optimizer, _: average_errors_(optimizer),
        "compare_workers()": lambda optimizer, _: optimizer.compare_workers(),
        "broadcast_parameters()": lambda optimizer, _: optimizer.broadcast_parameters(),
        "average_buffers()": lambda _, group: average_buffers(model, group),
    }
    results = {}
    for name, call in made.items():  # what is left in a group spoils it for what follows
        group = dist.new_group(list(range(world_size)))
        optimizer = make(start(), process_group=group)
        set_gradients(optimizer, 0, worker)
        optimizer.step()
        before = fingerprint(optimizer)
        action = functools.partial(call, optimizer, group) if worker == 0 else optimizer.step
        results[name] = {**error_of(action), "untouched": fingerprint(optimizer) == before}
        dist.barrier()
    return results


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    results = {"agree": agree, "die": die, "early": early, "alone": alone}[task]()
    if task in ("agree", "early"):
        results["threads"] = leave()
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    if task in ("die", "alone"):
        os._exit(0)  # the group is broken: nothing is left to be said goodbye to


if __name__ == "__main__":
    main()
