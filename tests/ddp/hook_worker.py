"""What one worker of `test_hook.py` does.

    python hook_worker.py [TASK ...] RESULTS

Each worker writes RESULTS/worker.json.
"""

import copy
import json
import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms import Join
from torch.nn.parallel import DistributedDataParallel

from efsgd import PowerSGD, TopK
from efsgd.ddp import CompressionState, compress
from tests.ddp.training import STEPS, Tower, Training

Report = dict[str, Any]


def compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(model, backend=CompileCounterWithBackend("eager"))


def uneven(worker: int, step: int) -> int | None:
    """Layer 2 is left out by worker 1 in some steps, and by all in others."""
    return 2 if step % 3 == 2 or (step % 3 == 1 and worker == 1) else None


UNUSED: Report = {"ddp": {"find_unused_parameters": True}, "without": uneven}
VARIANTS: dict[str, Callable[[], Report]] = {
    "plain": dict,
    "views": lambda: {"ddp": {"gradient_as_bucket_view": True}},
    "static": lambda: {"ddp": {"static_graph": True}},
    "inline": lambda: {"inline": True},
    "one bucket": lambda: {"options": {"bucket_bytes": None}},
    "accumulating": lambda: {"accumulates": True, "ddp": {"gradient_as_bucket_view": True}},
    "keeping zeros": lambda: {"keeps_zeros": True},
    "reentrant": lambda: {"model": Tower(reentrant=True), "ddp": {"static_graph": True}},
    "compiled": lambda: {"wrap": compiled, "ddp": {"bucket_cap_mb": 25}},
    "unused": lambda: UNUSED,
    "unused, views": lambda: (
        UNUSED | {"ddp": {"find_unused_parameters": True, "gradient_as_bucket_view": True}}
    ),
    "bfloat16": lambda: {"model": Tower(torch.bfloat16)},
    "float16": lambda: {"model": Tower(torch.float16)},
    "Top-K": lambda: {"options": {"compressor": TopK(0.1)}},
    "clipped": lambda: {"options": {"max_grad_norm": 0.01}},
    "later": lambda: {"options": {"start_compressing_at": 3, "check_every": 2}},
}


def variants(worker: int) -> Report:
    """Each of them by the hook, and by the averager."""
    found = {}
    for name, make in VARIANTS.items():
        found[name] = [
            Training(hooked, worker, **make()).train().fingerprint() for hooked in (True, False)
        ]
    return found


def long(worker: int) -> Report:
    """Many steps, with gradients that arrive while other buckets are exchanged."""
    steps = range(200 if dist.get_world_size() == 2 else 50)
    found = [Training(hooked, worker).train(steps) for hooked in (True, False)]
    return {
        "fingerprints": [each.fingerprint() for each in found],
        "stats": [each.averager.communication_stats() for each in found],
    }


def kept(worker: int) -> Report:
    """Nobody uses layer 2 in the third step, whose gradient is zero then, and not None."""
    training = Training(True, worker, keeps_zeros=True, **UNUSED).train(range(2))
    own = training.averager.param_groups[0]["params"][2 * 2]
    before = [training.averager.state[own][name].tolist() for name in ("error", "q")]
    training.step(2)
    after = [training.averager.state[own][name].tolist() for name in ("error", "q")]
    return {"before": before, "after": after}


def scaled(worker: int) -> Report:
    """With a scaler; in step 3 the gradients of worker 1 overflow."""
    found = []
    for hooked in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        training = Training(hooked, worker, scaler=scaler)
        applied = []
        for step in range(STEPS):
            is_spoiled = step == 3 and worker == 1
            applied.append(training.step(step, lambda x, s=is_spoiled: x * (torch.inf if s else 1)))
        found.append([training.fingerprint(), applied, scaler.get_scale()])
    return {"found": found}


def rejected(worker: int) -> Report:
    """A gradient that is not finite on one worker, by both policies."""

    def spoil(loss: Tensor) -> Tensor:
        return loss * (torch.nan if worker == 1 else 1)

    training, twin = (Training(True, worker).train(range(3)) for _ in range(2))
    before = state_of(training)
    report: Report = {"raise": error_of(lambda: training.step(3, spoil))}
    report["unchanged"] = state_of(training) == before
    report["goes on"] = [each.train(range(4, STEPS)).fingerprint() for each in (training, twin)]
    training = Training(True, worker, options={"nonfinite": "skip"}).train(range(3))
    before = state_of(training)
    report["skip"] = training.step(3, spoil)
    report["zeros"] = all(not p.grad.any() for p in training.model.parameters())
    report["unchanged by skipping"] = state_of(training) == before
    return report


def caught(worker: int) -> Report:
    """A program that goes on after an error of a backward pass."""
    training = Training(True, worker).train(range(2))
    error_of(lambda: training.backward(2, lambda loss: loss * torch.nan))
    return {"check": training.state.check()}


def spared(worker: int) -> Report:
    """Worker 1 overflows; the gradients of the others are zero. And a scaler that is disabled."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    training = Training(True, worker, scaler=scaler)
    factor = torch.inf if worker == 1 else 0.0
    training.step(0, lambda loss: loss * factor)
    report: Report = {"scale": scaler.get_scale()}
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    training = Training(True, worker, scaler=disabled, options={"nonfinite": "skip"})
    training.backward(0, lambda loss: loss * factor)
    report["zeros"] = all(not p.grad.any() for p in training.model.parameters())
    return report


def thawed(worker: int) -> Report:
    """A layer that is frozen when the state is made, and is trained later."""
    model = Tower()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    model.layers[2].requires_grad_(False)
    ddp.register_comm_hook(CompressionState(ddp), compress)
    found = []
    for is_trained in (False, True):
        model.layers[2].requires_grad_(is_trained)
        ddp.zero_grad()
        ddp(torch.ones(2, 16) + worker).square().mean().backward()
        found.append(_sums(model))
    return {"found": found}


def _sums(model: nn.Module) -> list[float | None]:
    return [None if p.grad is None else p.grad.sum().item() for p in model.parameters()]


def copied(worker: int) -> Report:
    """Models whose hook has run are copied and saved like any."""
    training = Training(True, worker).train(range(2))
    copy.deepcopy(training.net)
    again = pickle.loads(pickle.dumps(training.state))
    same = again.state_dict()["param_groups"] == training.state.state_dict()["param_groups"]
    return {"same": same, "kept": len(training.state._pass.views)}


def differing(worker: int) -> Report:
    """Another rank on one worker; then the same on all again."""
    training = Training(True, worker).train(range(2))
    group = training.averager.param_groups[0]
    group["rank"] = 2 + worker
    report: Report = {"error": error_of(lambda: training.step(2))}
    group["rank"] = 2
    report["goes on"] = training.train(range(3, 5)).fingerprint()
    return report


def failing(worker: int) -> Report:
    """An exception in the second bucket on one worker."""
    training, twin = (Training(True, worker).train(range(2)) for _ in range(2))
    before = state_of(training)
    aggregator = training.averager.engine.plan.buckets[1].aggregator
    original = aggregator.compress

    def fail(*_: Any) -> Any:
        aggregator.compress = original  # type: ignore[method-assign]
        raise MemoryError("none left")

    if worker == 1:
        aggregator.compress = fail  # type: ignore[method-assign]
    report: Report = {"error": error_of(lambda: training.step(2))}
    report["unchanged"] = state_of(training) == before
    report["goes on"] = [each.train(range(3, 5)).fingerprint() for each in (training, twin)]
    return report


def broken_off(worker: int, *, inline: bool = False) -> Report:
    """On one worker the backward pass raises in the midst; its program then asks for the state."""
    training = Training(True, worker, inline=inline).train(range(2))
    before = state_of(training)

    def fail(gradient: Tensor) -> Tensor:
        raise ZeroDivisionError

    if worker == 1:
        training.model.layers[0].weight.register_hook(fail)
    report: Report = {"error": error_of(lambda: training.backward(2))}
    if worker == 1:
        report["check"] = error_of(training.state.check)
    report["unchanged"] = state_of(training) == before
    return report


def two_models(worker: int) -> Report:
    """A GAN. The generator's pass is not one of the discriminator: `no_sync` says so."""
    found = []
    for hooked in (True, False):
        made, judged = (Training(hooked, worker) for _ in range(2))
        for step in range(4):
            noise = torch.randn(4, 16, generator=torch.Generator().manual_seed(worker + 9 * step))
            fake = made.net(noise)
            judged.optimizer.zero_grad()
            judged.net(fake.detach()).square().mean().backward()
            judged.average()
            judged.optimizer.step()
            made.optimizer.zero_grad()
            with judged.quiet():
                judged.net(fake).mean().backward()
            made.average()
            made.optimizer.step()
        found.append([made.fingerprint(), judged.fingerprint()])
    return {"found": found}


def resumed(worker: int) -> Report:
    """What is saved after some steps goes on as if nothing had happened, in either form."""
    whole = Training(True, worker).train(range(6)).fingerprint()
    found = []
    for hooked in (True, False):
        first = Training(True, worker).train(range(3))
        saved = first.state.state_dict(), first.optimizer.state_dict(), first.model.state_dict()
        later = Training(hooked, worker)
        (later.state if hooked else later.averager).load_state_dict(saved[0])
        later.optimizer.load_state_dict(saved[1])
        later.model.load_state_dict(saved[2])
        found.append(later.train(range(3, 6)).fingerprint())
    return {"whole": whole, "found": found}


def groups(worker: int) -> Report:
    """Parameter groups of another optimizer, which differ in rank, one parameter in two of them."""
    model = Tower()
    own = [
        {"params": [p for layer in model.layers[:2] for p in layer.parameters()], "rank": 1},
        {"params": [p for layer in model.layers[2:] for p in layer.parameters()], "lr": 3},
    ]
    ddp = DistributedDataParallel(model)
    state = CompressionState(own, PowerSGD(rank=3))
    ddp.register_comm_hook(state, compress)
    ddp(torch.ones(2, 16) + worker).square().mean().backward()
    ranks = [
        state.averager.state[p]["q"].shape[1:]
        for g in state.averager.param_groups
        for p in g["params"]
        if p.dim() == 2
    ]
    return {"ranks": [list(r) for r in ranks], "written": sorted(own[1])}


def unknown(worker: int) -> Report:
    """A state that was made from some of the model's parameters."""
    model = Tower()
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(CompressionState(list(model.parameters())[:2]), compress)
    return {"error": error_of(lambda: ddp(torch.ones(2, 16)).mean().backward())}


def sparse(worker: int) -> Report:
    """A table whose gradient is sparse."""
    ddp = DistributedDataParallel(nn.EmbeddingBag(9, 4, mode="sum", sparse=True))
    ddp.register_comm_hook(CompressionState(ddp), compress)
    return {"error": error_of(lambda: ddp(torch.tensor([[worker]])).sum().backward())}


def joined(worker: int) -> Report:
    """Worker 1 has more batches than the others."""
    training = Training(True, worker)
    with Join([training.net]):
        training.train(range(3 + 2 * worker))
    return {"fingerprint": training.fingerprint(), "stats": training.state.communication_stats()}


def again(worker: int) -> Report:
    """A state after another that was ended, with all workers and with a group of them."""
    found = []
    for group in (None, dist.group.WORLD, dist.new_group([0, 1])):
        for _ in range(2):
            model = Tower()
            ddp = DistributedDataParallel(model, process_group=group)
            state = CompressionState(ddp, process_group=group)
            ddp.register_comm_hook(state, compress)
            ddp(torch.ones(2, 16) + worker).square().mean().backward()
            state.detach()
            found.append(_sums(model))
    return {"found": found}


def detached(worker: int) -> Report:
    """Without the hook's work DDP averages as ever."""
    found = []
    for is_hooked in (True, False):
        model = Tower()
        ddp = DistributedDataParallel(model)
        if is_hooked:
            state = CompressionState(ddp)
            ddp.register_comm_hook(state, compress)
            state.detach()
        ddp(torch.ones(2, 16) + worker).square().mean().backward()
        found.append([p.grad.tolist() for p in model.parameters() if p.grad is not None])
    return {"found": found}


def broken_off_inline(worker: int) -> Report:
    """The same where gradients are exchanged once all are there."""
    return broken_off(worker, inline=True)


def dying(worker: int) -> Report:
    """Worker 1 dies in the midst of a backward pass."""
    training = Training(True, worker).train(range(2))
    before = state_of(training)

    def die(gradient: Tensor) -> Tensor:
        os._exit(0)

    if worker == 1:
        training.model.layers[0].weight.register_hook(die)
    report: Report = {"error": error_of(lambda: training.backward(2))}
    report["unchanged"] = state_of(training) == before
    return report


def state_of(training: Training) -> Report:
    """Of a fingerprint: all but gradients."""
    return {k: v for k, v in training.fingerprint().items() if k != "gradients"}


def error_of(action: Callable[[], object]) -> list[str]:
    try:
        action()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


TASKS: dict[str, Callable[[int], Report]] = {
    task.__name__: task
    for task in (
        variants,
        long,
        kept,
        scaled,
        rejected,
        caught,
        spared,
        thawed,
        copied,
        differing,
        failing,
        two_models,
        resumed,
        groups,
        unknown,
        detached,
        again,
        sparse,
        joined,
        broken_off,
        broken_off_inline,
    )
}
FATAL = {"dying": dying}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    *chosen, folder = sys.argv[1:]
    worker = dist.get_rank()
    report = {name: (TASKS | FATAL)[name](worker) for name in chosen or TASKS}
    Path(folder, f"{worker}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
