"""What one worker of `test_frameworks.py` does in Lightning. Run by torchrun.

torchrun --nproc-per-node 2 tests/integrations/frameworks/lightning_worker.py TASK FOLDER

TASK is "train", or "resume" from the checkpoints that "train" has left in FOLDER.
"""

import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, DistributedSampler

from efsgd import PowerSGDOptimizer
from efsgd.checkpoint import average_errors_
from tests.integrations.frameworks import common

LIMIT = timedelta(seconds=30)


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = common.network()

    def training_step(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self.network(inputs), targets)

    # [optimizer]
    def configure_optimizers(self) -> Any:
        optimizer = PowerSGDOptimizer(
            self.named_parameters(),
            lr=0.1,
            momentum=0.9,
            rank=2,
            momentum_form="sgd",
            max_grad_norm=0.2,
        )
        optimizer.broadcast_parameters()  # DistributedDataParallel does this, too
        optimizer.register_state_dict_pre_hook(average_errors_)
        return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1, gamma=0.5)}

    # [end]


# [unwrapped]
class Unwrapped(DDPStrategy):
    """DDPStrategy without DistributedDataParallel."""

    def configure_ddp(self) -> None:
        """Leaves the module as it is."""


# [end]


# [callback]
class LocalGradients(pl.Callback):
    """Has DistributedDataParallel leave the gradients alone."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.model, DistributedDataParallel):
            trainer.model.register_comm_hook(None, noop_hook)


# [end]


def unwrapped(**options: Any) -> pl.Trainer:
    # [unwrapped trainer]
    strategy = Unwrapped(timeout=timedelta(seconds=30))
    return pl.Trainer(strategy=strategy, devices=2, precision="bf16-mixed", **options)
    # [end]


def wrapped(callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    # [wrapped trainer]
    strategy = DDPStrategy(timeout=timedelta(seconds=30))
    callbacks = [LocalGradients(), *callbacks]
    return pl.Trainer(strategy=strategy, devices=2, callbacks=callbacks, **options)
    # [end]


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
ONCE: dict[str, Any] = {**QUIET, "devices": 2, "enable_checkpointing": False}


def loader() -> DataLoader[Any]:
    return DataLoader(common.digits(), batch_size=common.BATCH)


def fit(case: str, folder: Path, *, is_resumed: bool) -> dict[str, Any]:
    """All epochs in one of two ways, or those after the checkpoint."""
    saving = ModelCheckpoint(folder / case, "{epoch}", every_n_epochs=common.SAVED_AFTER)
    watch = Noting()
    options: dict[str, Any] = {
        **QUIET,
        "callbacks": [saving, watch],
        "max_epochs": common.EPOCHS,
        "accumulate_grad_batches": common.ACCUMULATE,
    }
    if case == "unwrapped":
        trainer = unwrapped(**options)
    else:
        trainer = wrapped(gradient_clip_val=common.CLIP, **options)
    checkpoint = next((folder / case).iterdir()) if is_resumed else None
    trainer.fit(Digits(), loader(), ckpt_path=checkpoint)
    return watch.report()


class Noting(pl.Callback):
    """Makes the watch of a fit's optimizer."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch = common.Watch(trainer.optimizers[0])
        self.is_wrapped = isinstance(trainer.model, DistributedDataParallel)

    def report(self) -> dict[str, Any]:
        return self.watch.report(is_wrapped=self.is_wrapped)


def plain() -> dict[str, Any]:
    options: dict[str, Any] = {"order": order, "max_grad_norm": 0.2}
    return {
        "unwrapped": common.plain_digits(precision=torch.bfloat16, **options),
        "wrapped": common.plain_digits(precision=torch.float32, clip=common.CLIP, **options),
    }


def order(worker: int, epoch: int) -> list[int]:
    """The examples that Lightning gives a worker: it shuffles, if there is no other sampler."""
    sampler = DistributedSampler(common.digits(), common.WORKERS, worker, shuffle=True, seed=0)
    sampler.set_epoch(epoch)
    return list(sampler)


def averaged_twice() -> dict[str, Any]:
    """Lightning registers `ddp_comm_hook` on CUDA devices only: on others it is ignored."""
    strategy = DDPStrategy(ddp_comm_hook=noop_hook, process_group_backend="gloo", timeout=LIMIT)
    watch = Noting()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = pl.Trainer(strategy=strategy, callbacks=[watch], max_steps=1, **ONCE)
        trainer.fit(Digits(), loader())
    words = "All workers have bitwise equal gradients"
    return {**watch.report(), "warned": common.warned(caught, words)}


class Overflows(Digits):
    """Worker 1's second loss is beyond float16."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch)
        return loss * (1e30 if dist.get_rank() == 1 and batch_idx == 1 else 1.0)


def scaled(**options: Any) -> dict[str, Any]:
    """float16 with loss scaling."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    watch = Noting()
    trainer = pl.Trainer(
        strategy=Unwrapped(timeout=LIMIT), plugins=[plugin], callbacks=[watch], max_steps=4, **ONCE
    )
    trainer.fit(Overflows(), loader())
    return {**watch.report(), "scale": plugin.scaler.get_scale()}


def clipped(plugin: MixedPrecision) -> str:
    """What Lightning says when it is asked to clip under mixed precision."""
    trainer = pl.Trainer(
        strategy=Unwrapped(timeout=LIMIT), plugins=[plugin], gradient_clip_val=1.0, **ONCE
    )
    try:
        trainer.fit(Digits(), loader())
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    cases = ("unwrapped", "wrapped")
    results: dict[str, Any] = {
        case: fit(case, folder, is_resumed=task == "resume") for case in cases
    }
    if task == "train":
        results["averaged_twice"], results["scaled"] = averaged_twice(), scaled()
        scaler = torch.amp.GradScaler("cpu")
        plugins = MixedPrecision("bf16-mixed", "cpu"), MixedPrecision("16-mixed", "cpu", scaler)
        results["clipped"] = [clipped(plugin) for plugin in plugins]
        if dist.get_rank() == 0:  # it has what both workers are compared with
            results["plain"] = plain()
    common.write(folder, dist.get_rank(), results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
