"""What one worker of `test_mixed_precision.py` does, under torchrun.

    python mixed_precision_worker.py RESULTS

Each worker writes RESULTS/worker.json.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from docs import hook_drift, hook_limits
from efsgd import PowerSGDOptimizer
from tests.integrations.around_ddp_training import (
    batch,
    fingerprint,
    loss_of,
    make_model,
    make_optimizer,
    parameters_of,
    quiet_ddp,
)
from tests.wire.process_worker import error_of, join

STEPS, OVERFLOW, OVERFLOWS_ON = 6, 2, 1  # in step 2 the loss of worker 1 is infinite
SCALE, GROWTH_INTERVAL, MAX_NORM = 2.0**12, 2, 0.5


def autocast_loss(model: nn.Module, inputs: Tensor) -> Tensor:
    """The loss, computed in bfloat16 where autocast says so."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return loss_of(model, inputs)


def autocast(worker: int) -> dict[str, Any]:
    """Training under autocast: a plain model, and one in DDP that leaves gradients alone."""
    found: dict[str, Any] = {}
    for name in ("plain", "noop_hook"):
        model = make_model()
        wrapped = model if name == "plain" else quiet_ddp(model)
        optimizer = make_optimizer(model)
        for step in range(STEPS):
            optimizer.zero_grad()
            autocast_loss(wrapped, batch(worker, step)).backward()
            optimizer.step()
        found[name] = fingerprint(optimizer)
        found["dtypes"] = sorted(dtypes(optimizer))
    return found


def dtypes(optimizer: PowerSGDOptimizer) -> set[str]:
    """Of parameters, gradients, and all that is kept for them."""
    found = set()
    for p in parameters_of(optimizer):
        found.add(f"parameter {p.dtype}")
        found.add(f"gradient {p.grad.dtype if p.grad is not None else None}")
        found.update(f"{name} {value.dtype}" for name, value in optimizer.state[p].items())
    return found


def scaled(worker: int, *, unscale_first: bool, scale: float = SCALE) -> dict[str, Any]:
    """Training with a GradScaler, whose scale is too large for worker 1 in one step."""
    model = make_model()
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=GROWTH_INTERVAL)
    scales, skipped, untouched = [scaler.get_scale()], [], None
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs = batch(worker, step)
        if (step, worker) == (OVERFLOW, OVERFLOWS_ON):
            inputs = inputs * torch.inf
        scaler.scale(autocast_loss(model, inputs)).backward()
        before = fingerprint(optimizer), optimizer.param_groups[0]["step"]
        if unscale_first:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), MAX_NORM)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        skipped.append(optimizer.communication_stats()["skipped_steps"])
        if step == OVERFLOW:
            untouched = (fingerprint(optimizer), optimizer.param_groups[0]["step"]) == before
    return {
        "trained": fingerprint(optimizer),
        "scales": scales,
        "skipped": skipped,
        "untouched": untouched,
        "step": optimizer.param_groups[0]["step"],
        "collectives": optimizer.communication_stats()["collectives"],
    }


def unscaled(worker: int, *, clip: bool) -> dict[str, list[int]]:
    """The same training without a scaler, which leaves the step with the overflow out."""
    model = make_model()
    optimizer = make_optimizer(model)
    for step in range(STEPS):
        if step == OVERFLOW:
            continue
        optimizer.zero_grad()
        autocast_loss(model, batch(worker, step)).backward()
        if clip:
            clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    return fingerprint(optimizer)


def without_gradients(worker: int) -> dict[str, Any]:
    """Steps in which worker 1 has no gradient, and so nothing to tell its scaler."""
    model = make_model()
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    start, refused = fingerprint(optimizer), []
    for step in range(2):
        optimizer.zero_grad()
        loss = scaler.scale(autocast_loss(model, batch(worker, step)))
        if worker == 0:
            loss.backward()
        scaler.step(optimizer)
        if worker == 0:
            scaler.update()
        else:
            refused.append(error_of(scaler.update)["type"])
            scaler.update(scaler.get_scale())
    return {"trained": fingerprint(optimizer), "start": start, "refused": refused}


def scaler(worker: int) -> dict[str, Any]:
    """Both stages of a GradScaler, and what they must be equal to."""
    return {
        "ready": scaled(worker, unscale_first=False),
        "unscaled": scaled(worker, unscale_first=True),
        "apart from the start": scaled(worker, unscale_first=False, scale=SCALE / 8**worker),
        "without gradients": without_gradients(worker),
        "ready, expected": unscaled(worker, clip=False),
        "unscaled, expected": unscaled(worker, clip=True),
    }


def pure_bfloat16(worker: int) -> dict[str, Any]:
    """A model that is bfloat16 throughout."""
    model = make_model().bfloat16()
    optimizer = make_optimizer(model)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_of(model, batch(worker, 0))
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    return {
        "trained": fingerprint(optimizer),
        "dtypes": sorted(dtypes(optimizer)),
        "losses": losses,
        "stats": optimizer.communication_stats(),
    }


def drift(worker: int) -> dict[str, Any]:
    """The bias gradient of docs/hook_drift.py, and its table."""
    mean = hook_drift.mean_bias_gradient(worker, torch.bfloat16)
    own = hook_drift.from_efsgd(worker, torch.bfloat16)
    of_hook = hook_drift.from_hook(worker, torch.bfloat16)
    return {
        "lines": hook_drift.table(of_hook, own, mean),
        "rounded mean": mean.bfloat16().tolist(),
        "own": [gradient.tolist() for gradient in own.values()],
    }


def zeros(worker: int) -> dict[str, Any]:
    """The table of docs/hook_limits.py."""
    return {"lines": hook_limits.zeros()}


TASKS: list[Callable[[int], dict[str, Any]]] = [autocast, scaler, pure_bfloat16, drift, zeros]


def main() -> None:
    """Entry point."""
    torch.set_num_threads(1)
    worker, _ = join()
    results = {task.__name__: task(worker) for task in TASKS}
    (Path(sys.argv[1]) / f"{worker}.json").write_text(json.dumps(results))
    dist.barrier()
    # Callbacks of torch's hook may hold the group in one of gloo's threads, which cannot end it.
    os._exit(0)


if __name__ == "__main__":
    main()
