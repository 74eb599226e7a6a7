"""What one worker of `test_private_processes.py` does.

    python private_worker.py RESULTS    trains on batches of its shard, some of which are empty

Each worker writes RESULTS/worker.json.
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from opacus import GradSampleModule
from torch.utils.data import TensorDataset

from efsgd import PowerSGDOptimizer
from efsgd.privacy import PrivateOptimizer, poisson_batches
from efsgd.wire.compare import checksum
from tests.privacy.teams import backward, batch, model

STEPS, RATE, RECORDS = 30, 0.05, 40


def make(worker: int, world_size: int) -> tuple[GradSampleModule, PrivateOptimizer, Any]:
    """Model, optimizer and batches of a worker; all draws are known."""
    module = GradSampleModule(model())
    optimizer = PrivateOptimizer(
        PowerSGDOptimizer(module.parameters(), lr=0.1, rank=1),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=RATE * RECORDS * world_size,
        sample_rate=RATE,
        module=module,
        generator=torch.Generator().manual_seed(10 + worker),
    )
    shard = TensorDataset(*batch(RECORDS, worker))
    draws = torch.Generator().manual_seed(50 + worker)
    return module, optimizer, poisson_batches(shard, RATE, STEPS, generator=draws)


def fingerprint(module: torch.nn.Module) -> list[int]:
    """Checksums of parameters."""
    return [checksum(parameter.detach()) for parameter in module.parameters()]


def train() -> dict[str, Any]:
    worker, world_size = dist.get_rank(), dist.get_world_size()
    module, optimizer, batches = make(worker, world_size)
    sizes, sent = [], []
    for inputs, classes in batches:
        optimizer.zero_grad()
        backward(module, inputs, classes)
        optimizer.step()
        sizes.append(len(inputs))
        stats = optimizer.communication_stats()
        sent.append([stats["collectives"], stats["bytes_sent"]])
    spent = {who: each["rdp"] for who, each in optimizer.guarantees(1e-5).items()}
    values = [p.detach().flatten().tolist() for p in module.parameters()]
    trained = fingerprint(module)
    return {"trained": trained, "values": values, "sizes": sizes, "sent": sent, "spent": spent,
            "total": stats["total_bytes_sent"], "check": stats["check_bytes_sent"]}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    report = train()
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
