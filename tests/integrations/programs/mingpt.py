"""A program of the structure of minGPT: a Trainer with callbacks, over a plain model.

Parameters by names in two groups, dropout, clipping in the trainer, a callback that reports and
saves. It knows nothing of several workers.
"""

import pickle
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import efsgd

VOCABULARY, WIDTH, LENGTH = 12, 20, 6
ITERATIONS, SAVED_AT = 6, 3


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.drop = nn.Embedding(VOCABULARY, WIDTH), nn.Dropout(0.1)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        x = self.drop(self.wte(idx)).cumsum(1)
        logits = self.lm_head(self.ln_f(x + self.mlp(x)))
        return logits, functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, config: SimpleNamespace) -> torch.optim.Optimizer:
        param_dict = dict(self.named_parameters())
        decay = sorted(n for n in param_dict if n.endswith("weight") and "ln" not in n)
        no_decay = sorted(param_dict.keys() - set(decay))
        groups = [
            {"params": [param_dict[n] for n in decay], "weight_decay": config.weight_decay},
            {"params": [param_dict[n] for n in no_decay], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95))


class Trainer:
    def __init__(self, config: SimpleNamespace, model: Model) -> None:
        self.config, self.model, self.iter_num = config, model, 0
        self.callbacks: dict[str, list[Callable[[Trainer], None]]] = defaultdict(list)
        self.optimizer = model.configure_optimizers(config)
        self.attached = efsgd.attach(model, self.optimizer, efsgd.PowerSGD(rank=2))

    def trigger(self, onevent: str) -> None:
        for callback in self.callbacks[onevent]:
            callback(self)

    def run(self) -> None:
        self.model.train()
        while self.iter_num < self.config.max_iters:
            torch.manual_seed(100 * self.iter_num + self.config.rank)  # of dropout, and to resume
            digits = torch.randint(VOCABULARY, (8, LENGTH + 1))
            _, self.loss = self.model(digits[:, :-1], digits[:, 1:])
            self.model.zero_grad(set_to_none=True)
            self.loss.backward()
            self.attached.average_()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_norm_clip)
            self.optimizer.step()
            self.iter_num += 1
            self.trigger("on_batch_end")


def main(folder: Path, init_from: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    rank = dist.get_rank()
    config = SimpleNamespace(
        rank=rank, learning_rate=1e-2, weight_decay=0.1, grad_norm_clip=0.5, max_iters=ITERATIONS
    )
    torch.manual_seed(rank)
    trainer = Trainer(config, Model())
    path = folder / f"model-{rank}.pt"

    def batch_end_callback(trainer: Trainer) -> None:
        if trainer.iter_num == SAVED_AT:  # every worker its own
            own: dict[str, Any] = {"model": trainer.model.state_dict(), "iter": trainer.iter_num}
            torch.save({**own, "optimizer": trainer.optimizer.state_dict()}, path)

    trainer.callbacks["on_batch_end"].append(batch_end_callback)
    if init_from == "resume":
        saved = torch.load(path, weights_only=True)
        trainer.model.load_state_dict(saved["model"])
        trainer.optimizer.load_state_dict(saved["optimizer"])
        trainer.iter_num = saved["iter"]
    trainer.run()
    pickle.dumps(trainer.model)  # nothing that is attached hinders it
    return trainer.model, trainer.optimizer
