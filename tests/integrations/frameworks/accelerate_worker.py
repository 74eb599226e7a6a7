"""What one worker of `test_frameworks.py` does with Accelerate. Run by torchrun.

torchrun --nproc-per-node 2 tests/integrations/frameworks/accelerate_worker.py TASK FOLDER

TASK is "train", or "resume" from the checkpoint that "train" has left in FOLDER.
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

from efsgd import PowerSGDOptimizer
from efsgd.checkpoint import average_errors_
from tests.integrations.frameworks import common


def fit(accelerator: Accelerator, folder: Path, *, is_resumed: bool) -> dict[str, Any]:
    """All epochs, or those after the checkpoint."""
    model = common.network()
    loader = DataLoader(common.digits(), batch_size=common.BATCH)
    # [prepare]
    optimizer = PowerSGDOptimizer(
        model.named_parameters(), lr=0.1, momentum=0.9, rank=2, momentum_form="sgd"
    )
    optimizer.register_state_dict_pre_hook(average_errors_)
    scheduler = StepLR(optimizer, 6, gamma=0.5)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if accelerator.num_processes > 1:
        model.register_comm_hook(None, noop_hook)
    # [end]
    watch = common.Watch(optimizer.optimizer)
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
        # [end]
        if epoch + 1 == common.SAVED_AFTER:
            accelerator.save_state(folder / "saved")  # by every worker
    return watch.report(is_wrapped=hasattr(model, "reducer"))


def overflow(worker: int) -> dict[str, Any]:
    """A step under loss scaling in Accelerate's wrapper, with an infinite loss on worker 1."""
    weight = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = PowerSGDOptimizer([weight], lr=0.1, rank=2)
    scaler = torch.amp.GradScaler("cpu")
    wrapper = AcceleratedOptimizer(optimizer, scaler=scaler)
    scaler.scale(weight.sum() * (torch.inf if worker == 1 else 1.0)).backward()
    wrapper.step()
    return {
        "is_untouched": bool((weight == 1).all()),
        "skipped_steps": optimizer.communication_stats()["skipped_steps"],
        "step_was_skipped": wrapper.step_was_skipped,
    }


def order(worker: int, epoch: int) -> list[int]:
    """The examples that Accelerate gives a worker: every other batch."""
    whole = torch.arange(common.EXAMPLES).view(-1, common.BATCH)
    return whole[worker :: common.WORKERS].flatten().tolist()


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16",
        gradient_accumulation_steps=common.ACCUMULATE,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=30))],
    )
    results: dict[str, Any] = {"accelerate": fit(accelerator, folder, is_resumed=task == "resume")}
    if task == "train":
        results["overflow"] = overflow(accelerator.process_index)
        if accelerator.is_main_process:  # it has what both workers are compared with
            plain = common.plain_digits(order, precision=torch.bfloat16, clip=common.CLIP)
            results["plain"] = {"accelerate": plain}
    common.write(folder, accelerator.process_index, results)
    accelerator.end_training()


if __name__ == "__main__":
    main()
