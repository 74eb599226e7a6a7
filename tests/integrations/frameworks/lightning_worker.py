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
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, DistributedSampler

from efsgd import PowerSGD, PowerSGDOptimizer
from efsgd.checkpoint import average_errors_
from efsgd.integrations.lightning import GradientCompression
from tests.integrations.frameworks import common

LIMIT = timedelta(seconds=30)


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = common.network()

    def training_step(self, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        return torch.nn.functional.cross_entropy(self.network(inputs), targets)

    def validation_step(self, batch: Any) -> None:
        self.log("loss", self.training_step(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=common.RATES[0])
        return {"optimizer": optimizer, "lr_scheduler": StepLR(optimizer, 1, gamma=0.5)}


class OwnOptimizer(Digits):
    # [own optimizer]
    def configure_optimizers(self) -> Any:
        optimizer = PowerSGDOptimizer(
            self.named_parameters(),
            lr=0.02,
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

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 2,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
ONCE: dict[str, Any] = {**QUIET, "enable_checkpointing": False, "logger": False}


def loader() -> DataLoader[Any]:
    return DataLoader(common.digits(), batch_size=common.BATCH)


class Noting(pl.Callback):
    """Makes the watch of a fit's optimizer."""

    def __init__(self, compression: GradientCompression | None = None) -> None:
        self.compression = compression

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer, attached = trainer.optimizers[0], self.compression and self.compression.attached
        exchanging = optimizer if attached is None else attached.averager
        self.watch = common.Watch(common.Trained(optimizer, exchanging))
        self.is_wrapped = isinstance(trainer.model, DistributedDataParallel)

    def report(self, **more: Any) -> dict[str, Any]:
        return self.watch.report(is_wrapped=self.is_wrapped, **more)


def attached(folder: Path, *, is_resumed: bool) -> dict[str, Any]:
    """All epochs with the callback, or those after the checkpoint."""
    saving = ModelCheckpoint(folder / "attached", "{epoch}", every_n_epochs=common.SAVED_AFTER)
    logger = CSVLogger(folder, "logs")
    options: dict[str, Any] = {
        **QUIET,
        "strategy": DDPStrategy(timeout=LIMIT),
        "max_epochs": common.EPOCHS,
        "accumulate_grad_batches": common.ACCUMULATE,
        "gradient_clip_val": common.CLIP,
        "logger": logger,
        "log_every_n_steps": 3,
        "num_sanity_val_steps": 0,
    }
    # [trainer]
    compression = GradientCompression(PowerSGD(rank=2))
    trainer = pl.Trainer(callbacks=[compression, saving], **options)
    # [end]
    watch = Noting(compression)
    trainer.callbacks.append(watch)
    checkpoint = next((folder / "attached").iterdir()) if is_resumed else None
    trainer.fit(Digits(), loader(), loader(), ckpt_path=checkpoint)
    return watch.report(log_dir=str(logger.log_dir))


def unwrapped(folder: Path, *, is_resumed: bool) -> dict[str, Any]:
    """The same with an optimizer of this package, without DistributedDataParallel."""
    saving, watch = ModelCheckpoint(folder / "own", every_n_epochs=common.SAVED_AFTER), Noting()
    options: dict[str, Any] = {
        **QUIET,
        "callbacks": [saving, watch],
        "max_epochs": common.EPOCHS,
        "accumulate_grad_batches": common.ACCUMULATE,
        "logger": False,
    }
    # [unwrapped trainer]
    strategy = Unwrapped(timeout=timedelta(seconds=30))
    trainer = pl.Trainer(strategy=strategy, precision="bf16-mixed", **options)
    # [end]
    checkpoint = next((folder / "own").iterdir()) if is_resumed else None
    trainer.fit(OwnOptimizer(), loader(), ckpt_path=checkpoint)
    return watch.report()


def plain() -> dict[str, Any]:
    def with_own(model: torch.nn.Module) -> common.Trained:
        return common.own(model, max_grad_norm=0.2)

    return {
        "attached": common.plain_digits(
            common.adamw, order, precision=torch.float32, clip=common.CLIP
        ),
        "unwrapped": common.plain_digits(with_own, order, precision=torch.bfloat16),
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
        trainer.fit(OwnOptimizer(), loader())
    words = "All workers have bitwise equal gradients"
    return {**watch.report(), "warned": common.warned(caught, words)}


class Overflows(Digits):
    """Worker 1's second loss is beyond float16."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch)
        return loss * (1e30 if dist.get_rank() == 1 and batch_idx == 1 else 1.0)


def short(module: Digits, strategy: DDPStrategy, **options: Any) -> dict[str, Any]:
    """A few steps with clipping."""
    compression = GradientCompression(PowerSGD(rank=2))
    watch = Noting(compression)
    trainer = pl.Trainer(
        strategy=strategy,
        callbacks=[compression, watch],
        gradient_clip_val=common.CLIP,
        max_steps=4,
        **options,
        **ONCE,
    )
    trainer.fit(module, loader())
    return watch.report()


def scaled(strategy: DDPStrategy) -> dict[str, Any]:
    """float16 with loss scaling."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    report = short(Overflows(), strategy, plugins=[plugin])
    return {**report, "scale": plugin.scaler.get_scale()}


class SeveralOptimizers(Digits):
    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW([p]) for p in self.parameters()]


def refused() -> list[str]:
    trainer = pl.Trainer(callbacks=[GradientCompression()], **{**ONCE, "devices": 1})
    return [common.error_of(trainer.fit, SeveralOptimizers(), loader())]


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        way.__name__: way(folder, is_resumed=task == "resume") for way in (attached, unwrapped)
    }
    if task == "train":
        results["averaged_twice"], results["refused"] = averaged_twice(), refused()
        kinds = DDPStrategy, Unwrapped
        results["scaled"] = [scaled(kind(timeout=LIMIT)) for kind in kinds]
        results["clipped"] = [short(Digits(), kind(timeout=LIMIT)) for kind in kinds]
        if dist.get_rank() == 0:  # it has what both workers are compared with
            results["plain"] = plain()
    common.write(folder, dist.get_rank(), results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
