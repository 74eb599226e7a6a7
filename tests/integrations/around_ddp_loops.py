"""What one worker of `test_around_ddp.py` does with the training loop."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms import Join
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import efsgd
from tests.integrations.around_ddp_training import (
    HIDDEN,
    OUTPUTS,
    batch,
    checksums,
    fingerprint,
    loss_of,
    make_model,
    make_optimizer,
    parameters_of,
    quiet_ddp,
    values,
)
from tests.wire.process_worker import error_of

MAX_NORM, CLIPPED_STEPS = 0.5, 6
UNEVEN = [5, 3]  # batches of each worker
SIZES = [[8, 8, 5], [8, 3, 1]]  # of each worker's batches
DECAY = 0.75


def clipped_gradients(step: int, worker: int) -> list[Tensor]:
    """Gradients of the parameters of `make_model`, float64; the first are too small to be cut."""
    generator = torch.Generator().manual_seed(100 * step + worker)
    scale = 0.001 if step < 2 else 1.0 + 2 * worker
    shapes = [p.shape for p in make_model().parameters()]
    return [
        scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    ]


def clipping(worker: int) -> dict[str, Any]:
    """Clipping before the step, of this worker's gradients; and within it, of their mean."""
    found: dict[str, Any] = {}
    for name, options in [("local", {}), ("global", {"max_grad_norm": MAX_NORM})]:
        optimizer = make_optimizer(make_model().double(), **options)
        norms = []
        for step in range(CLIPPED_STEPS):
            parameters = parameters_of(optimizer)
            for p, gradient in zip(parameters, clipped_gradients(step, worker), strict=True):
                p.grad = gradient
            if name == "local":
                norms.append(float(clip_grad_norm_(parameters, MAX_NORM)))
            optimizer.step()
            if name == "global":
                norms.append(optimizer.communication_stats()["grad_norm"])
        found[name] = {"norms": norms, "parameters": values(parameters_of(optimizer))}
    return found


def adversaries(worker: int) -> dict[str, Any]:
    """A generator and a discriminator, each with an optimizer of its own, in turn."""
    generator, discriminator = make_model(), nn.Sequential(nn.Linear(OUTPUTS, 16), nn.Tanh())
    nn.init.constant_(discriminator[0].weight, 0.1)
    nn.init.zeros_(discriminator[0].bias)
    optimizers = make_optimizer(generator), make_optimizer(discriminator, lr=0.02, rank=1)
    moved: set[tuple[bool, bool]] = set()
    for step in range(4):
        for turn, optimizer in [(1, optimizers[1]), (0, optimizers[0])]:
            before = [checksums(parameters_of(o)) for o in optimizers]
            optimizer.zero_grad()
            made = generator(batch(worker, step))
            if turn == 1:
                real = batch(worker, 100 + step)[:, :OUTPUTS]
                loss = discriminator(made.detach()).mean() - discriminator(real).mean()
            else:
                loss = -discriminator(made).mean()  # leaves gradients in the discriminator, too
            loss.backward()
            optimizer.step()
            after = [checksums(parameters_of(o)) for o in optimizers]
            own, other = before[turn] != after[turn], before[1 - turn] != after[1 - turn]
            moved.add((own, other))
    stats = [optimizer.communication_stats() for optimizer in optimizers]
    return {"trained": fingerprint(*optimizers), "moved": sorted(moved), "stats": stats}


def subgroups(worker: int) -> dict[str, Any]:
    """Each worker a group of its own; then the group of another."""
    groups = [dist.new_group([member]) for member in range(dist.get_world_size())]
    found: dict[str, Any] = {}
    model = make_model()
    optimizer = make_optimizer(model, process_group=groups[worker])
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, batch(worker, step)).backward()
        optimizer.step()
    found["trained"] = fingerprint(optimizer)
    outsider = make_optimizer(make_model(), process_group=groups[1 - worker])
    before = fingerprint(outsider)
    found["outsider"] = error_of(outsider.step)
    found["untouched"] = fingerprint(outsider) == before
    outsider.process_group = None  # all workers, from the next step on
    outsider.step()
    found["steps after it was given a group"] = outsider.communication_stats()["steps"]
    return found


def uneven(worker: int) -> dict[str, Any]:
    """Workers with different numbers of batches, which take part until the last has finished."""
    found: dict[str, Any] = {}
    for name in ("plain", "noop_hook"):
        model = make_model()
        wrapped = model if name == "plain" else quiet_ddp(model)
        optimizer = make_optimizer(model)
        joinables = [optimizer] if name == "plain" else [wrapped, optimizer]
        with Join(joinables):
            for number in range(UNEVEN[worker]):
                optimizer.zero_grad()
                loss_of(wrapped, batch(worker, number)).backward()
                optimizer.step()
        found[name] = fingerprint(optimizer)
        found[name + ", steps"] = optimizer.param_groups[0]["step"]
    return found


def weighted(worker: int) -> dict[str, Any]:
    """Batches of different sizes, each counted by its size."""
    found: dict[str, Any] = {}
    for name, rate in [("compressed", 1.0), ("uncompressed", float("inf"))]:
        model = make_model().double()
        optimizer = make_optimizer(model, min_compression_rate=rate)
        for number, sizes in enumerate(zip(*SIZES, strict=True)):
            optimizer.zero_grad()
            loss_of(model, batch(worker, number, sizes[worker])).backward()
            optimizer.weight = sizes[worker] * len(sizes) / sum(sizes)
            optimizer.step()
        found[name] = values(parameters_of(optimizer))
    return found


def averaged_models(worker: int) -> dict[str, Any]:
    """Averages of the parameters over the last steps: equal (SWA), and exponential (EMA)."""
    model = make_model(nn.BatchNorm1d(HIDDEN))
    optimizer = make_optimizer(model)
    schedule = SWALR(optimizer, swa_lr=0.01, anneal_epochs=2, anneal_strategy="linear")
    swa = AveragedModel(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    history, rates = [], []
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, batch(worker, step)).backward()
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
        swa.update_parameters(model)
        ema.update_parameters(model)
        history.append(values(model.parameters()))
    found: dict[str, Any] = {"history": history, "rates": rates}
    for name, averaged in (("swa", swa), ("ema", ema)):
        found[name] = values(averaged.module.parameters())
        update_bn([batch(worker, number) for number in range(4)], averaged)
        statistics = averaged.module[1]
        found[name + ", local"] = statistics.running_mean.tolist()
        efsgd.average_buffers(averaged)
        found[name + ", everywhere"] = statistics.running_mean.tolist()
    return found


def line_search(worker: int) -> dict[str, Any]:
    """L-BFGS, which evaluates its closure as often as the loss says, on the averaged loss."""
    model = make_model().double()
    averager = efsgd.GradientAverager(model.parameters(), compressor=efsgd.Identity())
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=6, line_search_fn="strong_wolfe")
    inputs, evaluations = batch(worker, 0), 0

    def closure() -> float:
        nonlocal evaluations
        evaluations += 1
        lbfgs.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        averager.average_()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return float(mean / dist.get_world_size())

    lbfgs.step(closure)
    return {"evaluations": evaluations, "parameters": values(model.parameters())}


LOOPS: list[Callable[[int], dict[str, Any]]] = [
    clipping, adversaries, subgroups, uneven, weighted, averaged_models, line_search
]  # fmt: skip
