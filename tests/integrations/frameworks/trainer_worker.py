"""What one worker of `test_frameworks.py` does with transformers' Trainer. Run by torchrun.

torchrun --nproc-per-node 2 tests/integrations/frameworks/trainer_worker.py TASK FOLDER

TASK is "train", or "resume" from the checkpoint that "train" has left in FOLDER.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
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

from efsgd import PowerSGDOptimizer
from efsgd.checkpoint import average_errors_
from tests.integrations.frameworks import common

SENTENCES = 4  # of one worker in one backward pass
SAVED_AFTER = 5  # steps, in the middle of an epoch


# [callback]
class LocalGradients(TrainerCallback):
    """Leaves averaging to the optimizer, and has it average its errors before it is saved."""

    def __init__(self, trainer: Trainer, optimizer: PowerSGDOptimizer) -> None:
        self.trainer, self.optimizer = trainer, optimizer
        self.hooked: torch.nn.Module | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = self.trainer.model_wrapped
        if isinstance(model, DistributedDataParallel) and model is not self.hooked:
            model.register_comm_hook(None, noop_hook)
            self.hooked = model

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save:
            average_errors_(self.optimizer)

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.save_strategy == "best":  # decided after the evaluation
            average_errors_(self.optimizer)


# [end]


def language_model() -> GPT2LMHeadModel:
    """A GPT-2 of two small layers, the same at each call."""
    set_seed(5)
    config = GPT2Config(
        vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


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
        **options,
    )


def fit(folder: Path, *, is_resumed: bool) -> dict[str, Any]:
    """All epochs, or what comes after the checkpoint."""
    model = language_model()
    training = arguments(
        folder / "saved",
        max_steps=9,
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=common.ACCUMULATE,
        max_grad_norm=common.CLIP,
        save_strategy="steps",
        save_steps=SAVED_AFTER,
        logging_steps=1,
    )
    # [trainer]
    optimizer = PowerSGDOptimizer(
        model.named_parameters(), lr=0.1, momentum=0.9, rank=2, momentum_form="sgd"
    )
    scheduler = StepLR(optimizer, 3, gamma=0.5)
    trainer = Trainer(model, training, train_dataset=sentences(), optimizers=(optimizer, scheduler))
    trainer.add_callback(LocalGradients(trainer, optimizer))
    # [end]
    watch = common.Watch(optimizer)
    checkpoint = str(folder / "saved" / f"checkpoint-{SAVED_AFTER}") if is_resumed else None
    trainer.train(resume_from_checkpoint=checkpoint)
    is_wrapped = isinstance(trainer.model_wrapped, DistributedDataParallel)
    return watch.report(is_wrapped=is_wrapped)


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

    models = [language_model() for _ in range(common.WORKERS)]
    return common.plain(models, losses, averaged_after=[SAVED_AFTER, 9], clip=common.CLIP)


def best(folder: Path) -> dict[str, Any]:
    """Saves after an evaluation that was the best so far, as the first one is."""
    model = language_model()
    options = {"max_steps": 1, "eval_strategy": "steps", "metric_for_best_model": "loss"}
    training = arguments(folder / "best", save_strategy="best", **options)
    optimizer = PowerSGDOptimizer(model.named_parameters(), lr=0.1, rank=2)
    data = {"train_dataset": sentences(), "eval_dataset": sentences()[:4]}
    trainer = Trainer(model, training, **data, optimizers=(optimizer, StepLR(optimizer, 9)))
    trainer.add_callback(LocalGradients(trainer, optimizer))
    trainer.train()
    return {"trained": common.fingerprint(optimizer)}


def main() -> None:
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    results: dict[str, Any] = {"trainer": fit(folder, is_resumed=task == "resume")}
    if task == "train":
        results["best"] = best(folder)
        if dist.get_rank() == 0:  # it has what both workers are compared with
            results["plain"] = {"trainer": plain()}
    common.write(folder, dist.get_rank(), results)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
