"""What one worker of `test_frameworks.py` does with Accelerate. Run by torchrun.

torchrun --nproc-per-node 2 tests/integrations/frameworks/accelerate_worker.py TASK FOLDER

TASK is "train", or "resume" from the checkpoint that "train" has left in FOLDER.
"""

import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import GeneralTracker
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

import efsgd
from efsgd import PowerSGD, PowerSGDOptimizer
from efsgd.checkpoint import average_errors_
from efsgd.integrations.accelerate import prepare
from tests.integrations.frameworks import common


class Notes(GeneralTracker):
    """A logger that keeps what it is given, on worker 0."""

    name, requires_logging_directory = "notes", False

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, dict[str, float]] = {}

    @property
    def tracker(self) -> Any:
        return self.found

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, Any], step: int | None = None, **options: Any) -> None:
        self.found[step or 0] = values


def fit(accelerator: Accelerator, folder: Path, *, is_resumed: bool) -> dict[str, Any]:
    """All epochs, or those after the checkpoint."""
    model = common.network()
    loader = DataLoader(common.digits(), batch_size=common.BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=common.RATES[0])
    scheduler = StepLR(optimizer, 6, gamma=0.5)
    # [prepare]
    model, optimizer, loader, scheduler, compression = prepare(
        accelerator, model, optimizer, loader, scheduler, compressor=PowerSGD(rank=2)
    )
    # [end]
    watch = common.Watch(common.Trained(optimizer.optimizer, compression.averager))
    if is_resumed:
        accelerator.load_state(folder / "saved")
    for epoch in range(common.SAVED_AFTER if is_resumed else 0, common.EPOCHS):
        # [loop]
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(inputs), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), common.CLIP)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.log(compression.metrics(), step=epoch)
        # [end]
        if epoch + 1 == common.SAVED_AFTER:
            accelerator.save_state(folder / "saved")  # by every worker
    return watch.report(is_wrapped=hasattr(model, "reducer"))


def overflow(worker: int) -> dict[str, Any]:
    """A step under loss scaling in Accelerate's wrapper, with an infinite loss on worker 1."""
    ddp = DistributedDataParallel(torch.nn.Linear(32, 32))
    before = [p.detach().clone() for p in ddp.parameters()]
    optimizer = torch.optim.AdamW(ddp.parameters())
    scaler = torch.amp.GradScaler("cpu")
    attached = efsgd.attach(ddp, optimizer, PowerSGD(rank=2), scaler=scaler)
    wrapper = AcceleratedOptimizer(optimizer, scaler=scaler)
    loss = ddp(torch.ones(4, 32)).square().mean() * (torch.inf if worker == 1 else 1.0)
    scaler.scale(loss).backward()
    wrapper.step()
    return {
        "is_untouched": all(map(torch.equal, ddp.parameters(), before)),
        "skipped_steps": attached.communication_stats()["skipped_steps"],
        "step_was_skipped": wrapper.step_was_skipped,
        "scale": scaler.get_scale(),
    }


def own_optimizer(accelerator: Accelerator, folder: Path) -> dict[str, Any]:
    """Steps and a checkpoint with an optimizer of this package."""
    model = common.network()
    inputs, targets = common.digits()[accelerator.process_index :: common.WORKERS]
    # [own optimizer]
    optimizer = PowerSGDOptimizer(
        model.named_parameters(), lr=0.02, momentum=0.9, rank=2, momentum_form="sgd"
    )
    optimizer.register_state_dict_pre_hook(average_errors_)
    model, optimizer = accelerator.prepare(model, optimizer)
    model.register_comm_hook(None, noop_hook)
    # [end]
    watch = common.Watch(common.Trained(optimizer.optimizer, optimizer.optimizer))
    for _ in range(3):
        accelerator.backward(torch.nn.functional.cross_entropy(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(folder / "own")
    return watch.report()


def refused(accelerator: Accelerator) -> list[str]:
    model = common.network()
    optimizer = torch.optim.AdamW(model.parameters())
    sharding = SimpleNamespace(distributed_type=DistributedType.FSDP)
    return [
        common.error_of(prepare, accelerator, model),
        common.error_of(prepare, accelerator, model, model, optimizer),
        common.error_of(prepare, sharding, model, optimizer),
    ]


def order(worker: int, epoch: int) -> list[int]:
    """The examples that Accelerate gives a worker: every other batch."""
    whole = torch.arange(common.EXAMPLES).view(-1, common.BATCH)
    return whole[worker :: common.WORKERS].flatten().tolist()


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    notes = Notes()
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16",
        gradient_accumulation_steps=common.ACCUMULATE,
        log_with=notes,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=30))],
    )
    accelerator.init_trackers("notes")
    results: dict[str, Any] = {"accelerate": fit(accelerator, folder, is_resumed=task == "resume")}
    results["logged"] = list(notes.found.values())
    if task == "train":
        results["overflow"] = overflow(accelerator.process_index)
        results["refused"] = refused(accelerator)
        accelerator.free_memory()
        results["own"] = own_optimizer(accelerator, folder)
        if accelerator.is_main_process:  # it has what both workers are compared with
            plain = common.plain_digits(
                common.adamw, order, precision=torch.bfloat16, clip=common.CLIP
            )
            results["plain"] = {"accelerate": plain}
    common.write(folder, accelerator.process_index, results)
    accelerator.end_training()


if __name__ == "__main__":
    main()
