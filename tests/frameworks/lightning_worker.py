"""What one worker of `test_frameworks.py` does in Lightning. Run by torchrun.

python -m torch.distributed.run --nproc-per-node 2 tests/frameworks/lightning_worker.py TASK FOLDER

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
from tests.frameworks import common

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
            self.named_parameters(), lr=0.1, momentum=0.9, rank=2, momentum_form="sgd"
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


def trainer(folder: Path, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", devices=2, default_root_dir=folder, **quiet, **options)


def loader() -> DataLoader[Any]:
    return DataLoader(common.digits(), batch_size=common.BATCH)


def fit(case: str, folder: Path, *, is_resumed: bool) -> dict[str, Any]:
    """All epochs in one of two ways, or those after the checkpoint."""
    # [trainer]
    unwrapped = {"strategy": Unwrapped(process_group_backend="gloo", timeout=LIMIT)}
    wrapped = {
        "strategy": DDPStrategy(process_group_backend="gloo", timeout=LIMIT),
        "callbacks": [LocalGradients()],
    }
    # [end]
    options: dict[str, Any] = {"unwrapped": unwrapped, "wrapped": wrapped}[case]
    kind = {
        "unwrapped": {"precision": "bf16-mixed"},
        "wrapped": {"gradient_clip_val": common.CLIP},
    }[case]
    saving = ModelCheckpoint(folder / case, "{epoch}", every_n_epochs=common.SAVED_AFTER)
    digits, watch = Digits(), Noting()
    trainer(
        folder,
        strategy=options["strategy"],
        callbacks=[*options.get("callbacks", []), saving, watch],
        max_epochs=common.EPOCHS,
        accumulate_grad_batches=common.ACCUMULATE,
        **kind,
    ).fit(digits, loader(), ckpt_path=next((folder / case).iterdir()) if is_resumed else None)
    return watch.report()


class Noting(pl.Callback):
    """Makes the watch of a fit's optimizer."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.watch = common.Watch(trainer.optimizers[0])
        self.is_wrapped = isinstance(trainer.model, DistributedDataParallel)

    def report(self) -> dict[str, Any]:
        return self.watch.report(is_wrapped=self.is_wrapped)


def plain() -> dict[str, Any]:
    """The same training without Lightning."""
    return {
        "unwrapped": common.plain_digits(order, precision=torch.bfloat16, clip=None),
        "wrapped": common.plain_digits(order, precision=torch.float32, clip=common.CLIP),
    }


def order(worker: int, epoch: int) -> list[int]:
    """The examples that Lightning gives a worker: it shuffles, if there is no other sampler."""
    sampler = DistributedSampler(common.digits(), common.WORKERS, worker, shuffle=True, seed=0)
    sampler.set_epoch(epoch)
    return list(sampler)


def averaged_twice(folder: Path) -> dict[str, Any]:
    """Lightning registers `ddp_comm_hook` on CUDA devices only: on others it is ignored."""
    strategy = DDPStrategy(ddp_comm_hook=noop_hook, process_group_backend="gloo", timeout=LIMIT)
    watch = Noting()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(
            folder, strategy=strategy, callbacks=[watch], max_steps=1, enable_checkpointing=False
        ).fit(Digits(), loader())
    words = "All workers have bitwise equal gradients"
    return {**watch.report(), "warned": common.warned(caught, words)}


class Overflows(Digits):
    """Worker 1's second loss is beyond float16."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch)
        return loss * (1e30 if dist.get_rank() == 1 and batch_idx == 1 else 1.0)


def scaled(folder: Path, **options: Any) -> dict[str, Any]:
    """float16 with loss scaling."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    strategy, watch = Unwrapped(process_group_backend="gloo", timeout=LIMIT), Noting()
    options = {
        "plugins": [plugin],
        "strategy": strategy,
        "max_steps": 4,
        "enable_checkpointing": False,
        **options,
    }
    try:
        trainer(folder, callbacks=[watch], **options).fit(Overflows(), loader())
    except RuntimeError as error:
        return {"error": str(error)}
    return {**watch.report(), "scale": plugin.scaler.get_scale()}


def main() -> None:
    """Entry point."""
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    cases = ("unwrapped", "wrapped")
    results: dict[str, Any] = {
        case: fit(case, folder, is_resumed=task == "resume") for case in cases
    }
    if task == "train":
        results["averaged_twice"] = averaged_twice(folder)
        results["scaled"] = scaled(folder)
        results["scaled_and_clipped"] = scaled(folder, gradient_clip_val=common.CLIP)
        bfloat16 = MixedPrecision("bf16-mixed", "cpu")
        results["bfloat16_and_clipped"] = scaled(
            folder, plugins=[bfloat16], gradient_clip_val=common.CLIP
        )
        results["plain"] = plain()
    common.write(folder / task, dist.get_rank(), results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
