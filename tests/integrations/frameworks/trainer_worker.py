"""What one worker of `test_frameworks.py` does with transformers' Trainer. Run by torchrun.

torchrun --nproc-per-node 2 tests/integrations/frameworks/trainer_worker.py TASK FOLDER

TASK is "train", or "resume" from the checkpoint that "train" has left in FOLDER.
"""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from efsgd import PowerSGD, PowerSGDOptimizer
from efsgd.checkpoint import average_errors_
from efsgd.integrations.transformers import GradientCompression
from tests.integrations.frameworks import common

SENTENCES = 4  # of one worker in one backward pass
SAVED_AFTER = 5  # steps, in the middle of an epoch
STEPS = 9
RATES = [common.RATES[0] * ((STEPS - step) / STEPS) for step in range(STEPS)]  # the default


# [own callback]
class LocalGradients(TrainerCallback):
    """Leaves averaging to the optimizer, and has it average its errors before it is saved."""

    def __init__(self, trainer: Trainer, optimizer: PowerSGDOptimizer) -> None:
        self.trainer, self.optimizer = trainer, optimizer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if isinstance(self.trainer.model_wrapped, DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, noop_hook)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            average_errors_(self.optimizer)

    on_epoch_end = on_step_end


# [end]


def language_model() -> GPT2LMHeadModel:
    """A GPT-2 of two small layers, the same at each call."""
    set_seed(5)
    config = GPT2Config(
        vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


class Adapted(torch.nn.Module):
    """A frozen language model with low-rank matrices beside its last layer, as LoRA has them."""

    def __init__(self) -> None:
        super().__init__()
        self.base = language_model().requires_grad_(False)
        self.down = torch.nn.Linear(24, 2, bias=False)
        self.up = torch.nn.Linear(2, 61, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.base.transformer(input_ids)[0]
        logits = self.base.lm_head(hidden) + self.up(self.down(hidden))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def sentences() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(61, (common.EXAMPLES // 4, 16), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        use_cpu=True,
        ddp_backend="gloo",
        ddp_timeout=30,
        ddp_find_unused_parameters=False,
        per_device_train_batch_size=SENTENCES,
        report_to="none",
        disable_tqdm=True,
        learning_rate=common.RATES[0],
        **options,
    )


def fit(folder: Path, *, is_resumed: bool) -> dict[str, Any]:
    """All epochs, or what comes after the checkpoint."""
    training = arguments(
        folder / "saved",
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=common.ACCUMULATE,
        max_grad_norm=common.CLIP,
        save_strategy="steps",
        save_steps=SAVED_AFTER,
        eval_strategy="steps",
        eval_steps=SAVED_AFTER - 1,
        logging_steps=3,
    )
    data = {"train_dataset": sentences(), "eval_dataset": sentences()[:4]}
    # [trainer]
    trainer = Trainer(language_model(), training, **data)
    compression = GradientCompression(trainer, PowerSGD(rank=2))
    trainer.add_callback(compression)
    # [end]
    watch = Noting(compression)
    trainer.add_callback(watch)
    checkpoint = str(folder / "saved" / f"checkpoint-{SAVED_AFTER}") if is_resumed else None
    trainer.train(resume_from_checkpoint=checkpoint)
    is_wrapped = isinstance(trainer.model_wrapped, DistributedDataParallel)
    return watch.watch.report(is_wrapped=is_wrapped, logged=trainer.state.log_history)


class Noting(TrainerCallback):
    """Makes the watch of an optimizer, once something is attached to it."""

    def __init__(self, compression: GradientCompression) -> None:
        self.compression = compression

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.compression.attached is not None
        trained = common.Trained(kwargs["optimizer"].optimizer, self.compression.attached.averager)
        self.watch = common.Watch(trained)


def plain() -> Any:
    data = torch.stack([each["input_ids"] for each in sentences()])

    def losses(model: torch.nn.Module, worker: int, step: int) -> Iterator[torch.Tensor]:
        for number in range(step * common.ACCUMULATE, (step + 1) * common.ACCUMULATE):
            first = (number * common.WORKERS + worker) * SENTENCES % len(data)
            own = data[first : first + SENTENCES]
            # Trainer divides a worker's sum by the number of labels of all workers, and multiplies
            # by the number of workers: it expects gradients to be averaged, as they are.
            labels = common.WORKERS * common.ACCUMULATE * own.numel()
            outputs = model(input_ids=own, labels=own, num_items_in_batch=labels)
            yield outputs.loss * common.WORKERS

    def make(model: torch.nn.Module) -> common.Trained:
        """What the Trainer makes: a group of matrices, and one of what is not to decay."""
        sides = (True, False)
        groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == s]} for s in sides]
        return common.averaged(torch.optim.AdamW(groups, weight_decay=0.0, fused=True))

    models = [language_model() for _ in range(common.WORKERS)]
    options: dict[str, Any] = {"averaged_after": [SAVED_AFTER, STEPS], "clip": common.CLIP}
    return common.plain(models, losses, make, rates=RATES, **options)


def best(folder: Path) -> dict[str, Any]:
    """Saves after an evaluation that was the best so far, as the first one is."""
    options = {"max_steps": 1, "eval_strategy": "steps", "metric_for_best_model": "loss"}
    training = arguments(folder / "best", save_strategy="best", **options)
    data = {"train_dataset": sentences(), "eval_dataset": sentences()[:4]}
    trainer = Trainer(language_model(), training, **data)
    compression = GradientCompression(trainer, PowerSGD(rank=2))
    trainer.add_callback(compression)
    trainer.train()
    assert compression.attached is not None
    return {"trained": common.fingerprint(compression.attached.averager)}


def own_optimizer(folder: Path) -> dict[str, Any]:
    """The second way: an optimizer of this package, and a callback that leaves it its gradients."""
    model = language_model()
    training = arguments(folder / "own", max_steps=2, save_strategy="steps", save_steps=2)
    data = {"train_dataset": sentences()}
    # [own optimizer]
    optimizer = PowerSGDOptimizer(
        model.named_parameters(), lr=0.02, momentum=0.9, rank=2, momentum_form="sgd"
    )
    scheduler = StepLR(optimizer, 3, gamma=0.5)
    trainer = Trainer(model, training, **data, optimizers=(optimizer, scheduler))
    trainer.add_callback(LocalGradients(trainer, optimizer))
    # [end]
    watch = common.Watch(common.Trained(optimizer, optimizer))
    trainer.train()
    return watch.report()


def adapters(folder: Path) -> list[str]:
    """What a user is told who compresses the gradients of adapters."""
    training = arguments(folder / "adapters", max_steps=2, save_strategy="no")
    trainer = Trainer(Adapted(), training, train_dataset=sentences())
    trainer.add_callback(GradientCompression(trainer, PowerSGD(rank=4)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    return [str(warning.message) for warning in caught]


def refused() -> list[str]:
    sharding = SimpleNamespace(is_fsdp_enabled=True, is_deepspeed_enabled=False)
    return [common.error_of(GradientCompression, sharding)]


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    results: dict[str, Any] = {"trainer": fit(folder, is_resumed=task == "resume")}
    if task == "train":
        results["best"], results["own"] = best(folder), own_optimizer(folder)
        results["adapters"], results["refused"] = adapters(folder), refused()
        if dist.get_rank() == 0:  # it has what both workers are compared with
            results["plain"] = {"trainer": plain()}
    common.write(folder, dist.get_rank(), results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
