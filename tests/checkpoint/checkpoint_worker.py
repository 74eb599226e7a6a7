"""What one of eight workers of `test_distributed_checkpoint.py` does. Run by torchrun.

    python checkpoint_worker.py FOLDER

Workers 0 to 3 train and save in a group of their own. They load again, and so do the first two, the
first three, and all eight. Each worker writes FOLDER/worker.pt.
"""

import copy
import runpy
import sys
import tempfile
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from efsgd import PowerSGDOptimizer
from efsgd.checkpoint import ElasticLoadPlanner, OptimizerState, average_errors_

examples = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "checkpoints.py"))

SAVED_BY = 4
SAVED_AT, END = 5, 8  # steps
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def make_model(seed: int = 0, width: int = 12) -> nn.Module:
    """In float64, so that a mean is exact to 1e-15 and a resumed run can be compared closely."""
    torch.manual_seed(seed)
    layers = [nn.Linear(10, width), nn.Linear(width, 12), nn.Linear(12, 12), nn.Linear(12, 6)]
    return nn.Sequential(*layers).double()


def make_optimizer(model: nn.Module, **options: Any) -> PowerSGDOptimizer:
    """Two groups of different rank."""
    groups = [{"params": model[:2].parameters()}, {"params": model[2:].parameters(), "rank": 1}]
    return PowerSGDOptimizer(groups, **{"lr": 0.05, "momentum": 0.9, "rank": 2, **options})


def train(
    model: nn.Module, optimizer: PowerSGDOptimizer, steps: range, worker: int, world_size: int
) -> None:
    """Steps whose gradients have a mean that does not depend on the number of workers."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        sign = 1 - 2 * (worker % 2)
        for parameter in model.parameters():
            shape = parameter.shape
            mean, own = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
            parameter.grad = mean + sign * own * (1 + worker // 2)
        optimizer.step()
        if step == 1:  # it leaves an error behind
            model[1].weight.requires_grad_(False)


def values_of(model: nn.Module, optimizer: PowerSGDOptimizer) -> dict[str, Any]:
    """Copies of parameters and state by name, and of settings."""
    state = {name: dict(optimizer.state.get(p, {})) for name, p in model.named_parameters()}
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return copy.deepcopy({"model": model.state_dict(), "state": state, "groups": groups})


class Recording(ElasticLoadPlanner):
    """Remembers which errors were read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        super().commit_tensor(read_item, tensor)
        if ".errors." in read_item.storage_index.fqn:
            self.read.append(read_item.storage_index.fqn)


def async_save_copies() -> bool:
    """Whether this torch's async_save copies what is on a CPU; asked while there is no group.

    Older torch writes what is there later, of models as of optimizers.
    """
    may_write = threading.Event()

    class Waiting(dcp.FileSystemWriter):
        def write_data(self, *given: Any) -> Any:
            may_write.wait()
            return super().write_data(*given)

    zeros = {"values": torch.zeros(3)}
    loaded = {"values": torch.ones(3)}
    with tempfile.TemporaryDirectory() as folder:
        writing = dcp.async_save(zeros, storage_writer=Waiting(folder))
        zeros["values"].fill_(2.0)
        may_write.set()
        writing.result()
        dcp.load(loaded, checkpoint_id=folder)
    return not loaded["values"].any()


class Worker:
    """One worker in one group of `world_size` workers; None is the group of all."""

    def __init__(
        self, folder: Path, group: dist.ProcessGroup | None, *, may_go_on: bool = True
    ) -> None:
        self.folder, self.group = folder, group
        self.may_go_on = may_go_on  # while async_save writes
        self.worker, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    def fresh(self, seed: int = 0, **options: Any) -> tuple[nn.Module, PowerSGDOptimizer]:
        """Another model than the one that was trained, of the same shapes."""
        model = make_model(seed)
        return model, make_optimizer(model, process_group=self.group, **options)

    def resumed(self, seed: int = 1) -> tuple[nn.Module, PowerSGDOptimizer]:
        """As `fresh`, and frozen like the one that was saved."""
        model, optimizer = self.fresh(seed)
        train(model, optimizer, range(2), self.worker, self.world_size)
        return model, optimizer

    def load(self, state: dict[str, Any], name: str, **options: Any) -> None:
        dcp.load(state, checkpoint_id=self.folder / name, process_group=self.group, **options)

    def go_on(self, model: nn.Module, optimizer: PowerSGDOptimizer) -> dict[str, Any]:
        """What was loaded, and what training makes of it."""
        loaded = values_of(model, optimizer)
        train(model, optimizer, range(SAVED_AT, END), self.worker, self.world_size)
        return {"loaded": loaded, "trained": values_of(model, optimizer)}

    def documented(self, writers: dist.ProcessGroup) -> dict[str, Any]:
        """Saves and loads in the ways that the documentation shows."""
        found = {}
        for way in ("own", "consolidated", "with_errors", "async", "averaged"):
            folder = self.folder / f"documented-{way}"
            folder.mkdir(exist_ok=True)
            model, optimizer = self.fresh()
            train(model, optimizer, range(1), self.worker, self.world_size)
            other, its = self.fresh(seed=1)
            if way == "consolidated":  # the way that sees to buffers, too
                for each, mean in ((model, self.worker), (other, -1)):
                    each.append(nn.BatchNorm1d(6).double())
                    nn.init.constant_(each[-1].running_mean, mean)
            if way == "async":
                examples["start_saving"](model, optimizer, folder, writers).result()
            else:
                examples[f"save_{way}"](model, optimizer, folder)
            dist.barrier()
            load = examples["load_with_errors" if way == "async" else f"load_{way}"]
            load(other, its, folder)
            saved = values_of(model, optimizer)
            found[way] = {"saved": saved, "loaded": values_of(other, its)}
        return found

    def alone(self) -> dict[str, Any]:
        """Asks for state dicts while no other worker does; a step would wait for the others."""
        found = {}
        for momentum, rate in ((0.9, 1.0), (0.0, float("inf"))):
            model, optimizer = self.fresh(momentum=momentum, min_compression_rate=rate)
            before = values_of(model, optimizer)
            for options in (None, FLAT):
                get_optimizer_state_dict(model, optimizer, options=options)
            sent = optimizer.communication_stats()["total_bytes_sent"]
            found[momentum] = {"sent": sent, "before": before, "after": values_of(model, optimizer)}
        return found

    def save(self, writers: dist.ProcessGroup) -> dict[str, Any]:
        """Trains, saves twice, and trains on while the second checkpoint is being written."""
        model, optimizer = self.fresh()
        train(model, optimizer, range(SAVED_AT), self.worker, self.world_size)
        saved = values_of(model, optimizer)
        state = {"model": model, "optimizer": OptimizerState(model, optimizer)}
        dcp.save(state, checkpoint_id=self.folder / "exact", process_group=self.group)
        writing = dcp.async_save(state, checkpoint_id=self.folder / "async", process_group=writers)
        if not self.may_go_on:
            writing.result()
        train(model, optimizer, range(SAVED_AT, END), self.worker, self.world_size)
        writing.result()
        return {"saved": saved, "trained": values_of(model, optimizer)}

    def save_averaged(self) -> dict[str, Any]:
        """Averages the errors, and saves as one would save any optimizer."""
        model, optimizer = self.resumed()
        self.load({"model": model, "optimizer": OptimizerState(model, optimizer)}, "exact")
        average_errors_(optimizer)
        state = {
            "model": model.state_dict(),
            "nested": get_optimizer_state_dict(model, optimizer),
            "flat": get_optimizer_state_dict(model, optimizer, options=FLAT),
        }
        dcp.save(state, checkpoint_id=self.folder / "averaged", process_group=self.group)
        return {"saved": values_of(model, optimizer)}

    def load_elastic(self, name: str) -> dict[str, Any]:
        model, optimizer = self.resumed()
        planner = Recording()
        state = {"model": model, "optimizer": OptimizerState(model, optimizer)}
        self.load(state, name, planner=planner)
        return {**self.go_on(model, optimizer), "read": planner.read}

    def load_plainly(self) -> dict[str, Any]:
        """Without a planner of ours, and under the names that a wrapper has for its parameters."""
        model, optimizer = self.resumed()
        ddp = nn.parallel.DistributedDataParallel(model, process_group=self.group)
        self.load({"model": model, "optimizer": OptimizerState(ddp, optimizer)}, "async")
        return self.go_on(model, optimizer)

    def load_averaged(self, kind: str) -> dict[str, Any]:
        model, optimizer = self.resumed()
        options = FLAT if kind == "flat" else None
        state = {
            "model": model.state_dict(),
            kind: get_optimizer_state_dict(model, optimizer, options=options),
        }
        self.load(state, "averaged")
        model.load_state_dict(state["model"])
        set_optimizer_state_dict(model, optimizer, state[kind], options=options)
        return self.go_on(model, optimizer)

    def refused(self, name: str, width: int = 12, **options: Any) -> dict[str, Any]:
        """Loads what does not fit: with what error, and what has changed."""
        model = make_model(1, width)
        optimizer = make_optimizer(model, process_group=self.group)
        train(model, optimizer, range(2), self.worker, self.world_size)
        before = values_of(model, optimizer)
        text = ""
        try:
            self.load({"optimizer": OptimizerState(model, optimizer)}, name, **options)
        except CheckpointException as error:
            text = " ".join(sorted({repr(cause) for cause, _ in error.failures.values()}))
        return {"text": text, "before": before, "after": values_of(model, optimizer)}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    may_go_on = async_save_copies()
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    worker = dist.get_rank()
    four, writers = dist.new_group(range(SAVED_BY)), dist.new_group(range(SAVED_BY))
    all_writers = dist.new_group()
    two, three = dist.new_group(range(2)), dist.new_group(range(3))
    results: dict[str, Any] = {}
    if worker < SAVED_BY:
        own = Worker(folder, four, may_go_on=may_go_on)
        if worker == 1:
            results["alone"] = own.alone()
        results["four"] = {
            "exact": own.save(writers),
            "elastic": own.load_elastic("exact"),
            "plain": own.load_plainly(),
            "averaged": own.save_averaged(),
        }
    dist.barrier()
    for name, group, size in (("two", two, 2), ("three", three, 3), ("eight", None, 8)):
        if worker >= size:
            continue
        own = Worker(folder, group)
        results[name] = {"elastic": own.load_elastic("async")}
        if name == "three":
            continue
        results[name] |= {
            "nested": own.load_averaged("nested"),
            "flat": own.load_averaged("flat"),
            "without planner": own.refused("exact"),
            "foreign": own.refused("averaged", planner=ElasticLoadPlanner()),
            "other model": own.refused("exact", width=13, planner=ElasticLoadPlanner()),
        }
    results["documented"] = Worker(folder, None).documented(all_writers)
    torch.save(results, folder / f"{worker}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
