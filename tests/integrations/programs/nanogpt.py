"""A program of the structure of nanoGPT: DistributedDataParallel, GradScaler, fused AdamW.

Tied embeddings, decay and no decay, accumulation that synchronizes the last backward pass only,
clipping of unscaled gradients, a schedule set by hand, and checkpoints that rank 0 writes.
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import efsgd

VOCABULARY, WIDTH, CONTEXT, BATCH = 40, 24, 16, 4
ACCUMULATION, ITERATIONS, SAVED_AT = 2, 6, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.c_fc, self.c_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.c_attn(self.ln_1(x)).split(WIDTH, dim=2))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.squeeze(1))
        return x + self.c_out(functional.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h, self.ln_f = nn.ModuleList([Block(), Block()]), nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.wte.weight = self.lm_head.weight  # weight tying

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay: float, lr: float) -> torch.optim.Optimizer:
        decay = [p for p in self.parameters() if p.dim() >= 2]
        others = [p for p in self.parameters() if p.dim() < 2]
        groups = [
            {"params": decay, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def get_batch(rank: int, number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * rank + number)
    words = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=generator)
    return words[:, :-1], words[:, 1:]


def main(folder: Path, init_from: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    rank = dist.get_rank()
    master_process = rank == 0
    torch.manual_seed(1337 + rank)
    model = GPT()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = model.configure_optimizers(weight_decay=0.1, lr=1e-2)
    first, checkpoint = 0, None
    if init_from == "resume":
        checkpoint = torch.load(folder / "ckpt.pt", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        first = checkpoint["iter_num"]
    ddp = DistributedDataParallel(model)
    attached = efsgd.attach(ddp, optimizer, efsgd.PowerSGD(rank=2), scaler=scaler)
    if checkpoint is not None:  # in nanoGPT before the model is wrapped
        optimizer.load_state_dict(checkpoint["optimizer"])
    for iter_num in range(first, ITERATIONS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * iter_num / ITERATIONS))
        if iter_num == SAVED_AT:
            attached.consolidate()
        if iter_num == SAVED_AT and master_process:
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "iter_num": iter_num,
            }
            torch.save(checkpoint, folder / "ckpt.pt")
        for micro_step in range(ACCUMULATION):
            ddp.require_backward_grad_sync = micro_step == ACCUMULATION - 1
            x, y = get_batch(rank, iter_num * ACCUMULATION + micro_step)
            with torch.amp.autocast("cpu", dtype=torch.bfloat16):
                loss = ddp(x, y) / ACCUMULATION
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(ddp.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return model, optimizer
