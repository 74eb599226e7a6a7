"""The ways to save and to resume a run, as functions for each worker to call.

`folder` is the same on all workers, and each of them can read and write it.
"""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from efsgd import PowerSGDOptimizer, average_buffers
from efsgd.checkpoint import (
    ElasticLoadPlanner,
    OptimizerState,
    average_errors_,
    consolidated_state_dict,
)
from efsgd.rank import RankScheduler

Model, Optimizer = torch.nn.Module, PowerSGDOptimizer


def save_own(model: Model, optimizer: Optimizer, folder: Path) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / f"worker-{dist.get_rank()}.pt")


def load_own(model: Model, optimizer: Optimizer, folder: Path) -> None:
    state = torch.load(folder / f"worker-{dist.get_rank()}.pt")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def save_consolidated(model: Model, optimizer: Optimizer, folder: Path) -> None:
    average_buffers(model)  # on every worker, as the next line
    averaged = consolidated_state_dict(optimizer)
    if dist.get_rank() == 0:
        state = {"model": model.state_dict(), "optimizer": averaged}
        torch.save(state, folder / "all-workers.pt")


def load_consolidated(model: Model, optimizer: Optimizer, folder: Path) -> None:
    state = torch.load(folder / "all-workers.pt")  # on every worker
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def save_with_errors(model: Model, optimizer: Optimizer, folder: Path) -> None:
    state = {"model": model, "optimizer": OptimizerState(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)


def load_with_errors(model: Model, optimizer: Optimizer, folder: Path) -> None:
    state = {"model": model, "optimizer": OptimizerState(model, optimizer)}
    dcp.load(state, checkpoint_id=folder, planner=ElasticLoadPlanner())


def save_with_ranks(
    model: Model, optimizer: Optimizer, scheduler: RankScheduler, folder: Path
) -> None:
    save_with_errors(model, optimizer, folder)
    consolidated = scheduler.consolidated_state_dict()  # on every worker
    if dist.get_rank() == 0:
        torch.save(consolidated, folder / "rank-scheduler.pt")


def load_with_ranks(
    model: Model, optimizer: Optimizer, scheduler: RankScheduler, folder: Path
) -> None:
    load_with_errors(model, optimizer, folder)
    scheduler.load_state_dict(torch.load(folder / "rank-scheduler.pt"))  # on every worker


def start_saving(
    model: Model, optimizer: Optimizer, folder: Path, group: dist.ProcessGroup
) -> Future[Any]:
    state = {"model": model, "optimizer": OptimizerState(model, optimizer)}
    return dcp.async_save(state, checkpoint_id=folder, process_group=group)


def save_averaged(model: Model, optimizer: Optimizer, folder: Path) -> None:
    average_errors_(optimizer)  # on every worker
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=folder)


def load_averaged(model: Model, optimizer: Optimizer, folder: Path) -> None:
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
