"""What one worker of `test_rank_scheduler.py` does; run by torchrun. It takes a folder."""

import json
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from efsgd import PowerSGDOptimizer
from efsgd.rank import Accordion, RankScheduler
from efsgd.wire.compare import checksum
from tests.rank.rank_policies import Odd
from tests.rank.rank_runs import SQUARE, individual
from tests.simulation import parameters_of
from tests.strategies import gaussian

SHAPES = [SQUARE, (80, 64), (10,)]
WINDOWS, STEPS = 5, 2


def policy() -> Accordion:
    """That of each worker. The second layer has more numbers than its sketch."""
    return Accordion(1, 3, interval=1, sketch=512)


def gradients(window: int, step: int, worker: int) -> list[Tensor]:
    """Made-up gradients; those of window 2 are larger."""
    scale = 10.0 if window == 2 else 1.0
    return [scale * (0.2 * gaussian(s, window, step, worker, i) + 1) for i, s in enumerate(SHAPES)]


def fingerprint(optimizer: PowerSGDOptimizer) -> list[int]:
    return [checksum(p.detach()) for p in parameters_of(optimizer)]


def checksums(sums: Mapping[int, Tensor]) -> list[int]:
    return [checksum(value) for value in sums.values()]


def train(worker: int) -> dict[str, Any]:
    """Trains, consolidates, and meets an error on worker 1 alone."""
    own = [torch.zeros(shape, requires_grad=True) for shape in SHAPES]
    optimizer = PowerSGDOptimizer([{"params": [each]} for each in own], lr=1.0)
    scheduler = RankScheduler(optimizer, policy())
    decided = []
    for window in range(WINDOWS):
        for step in range(STEPS):
            for parameter, gradient in zip(own, gradients(window, step, worker), strict=True):
                parameter.grad = gradient.float()
            optimizer.step()
        scheduler.step()
        decided.append(individual(optimizer))
    report = {
        "decided": decided,
        "decision bytes": optimizer.communication_stats()["decision_bytes_sent"],
        "parameters": fingerprint(optimizer),
        "sums": checksums(scheduler.consolidated_state_dict()["sums"][0]["sums"]),
    }
    scheduler.close()
    odd = RankScheduler(optimizer, Odd(1, RuntimeError("a policy's own words")))
    optimizer.step()
    before = individual(optimizer)
    try:
        odd.step()
    except Exception as error:
        report["error"] = type(error).__name__
    return {**report, "unchanged": individual(optimizer) == before}


def made(seed: int) -> tuple[nn.Module, PowerSGDOptimizer, RankScheduler]:
    """A small model, its optimizer, and a scheduler of ranks."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 24))
    optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, RankScheduler(optimizer, policy())


def go_on(optimizer: PowerSGDOptimizer, scheduler: RankScheduler, steps: range, worker: int) -> str:
    """Trains, with a decision after every third step; what came of it."""
    for step in steps:
        for index, parameter in enumerate(parameters_of(optimizer)):
            scale = 10.0 if step == 6 else 1.0
            parameter.grad = scale * gaussian(parameter.shape, step, worker, index).float()
        optimizer.step()
        if step % 3 == 2:
            scheduler.step()
    return str((fingerprint(optimizer), scheduler.get_last_ranks()))


def resume(worker: int, folder: Path) -> list[str]:
    """Saves in the middle of a window and goes on; loads with other ranks, and goes on."""
    examples = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "checkpoints.py"))
    found = []
    for seed, name in ((0, "save_with_ranks"), (1, "load_with_ranks")):
        model, optimizer, scheduler = made(seed)
        if seed == 0:
            optimizer.broadcast_parameters()
            go_on(optimizer, scheduler, range(5), worker)
        examples[name](model, optimizer, scheduler, folder / "checkpoint")
        dist.barrier()  # the file of the scheduler is written by worker 0
        found.append(go_on(optimizer, scheduler, range(5, 12), worker))
    return found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    worker = dist.get_rank()
    report = train(worker)
    report["resumed"] = resume(worker, Path(sys.argv[1]))
    dist.destroy_process_group()
    (Path(sys.argv[1]) / f"{worker}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
