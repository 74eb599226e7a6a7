"""What one worker of `test_lq_sgd.py` does, under torchrun: RESULTS/worker.json says what came.

python lq_sgd_worker.py RESULTS
"""

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efsgd import ErrorFeedbackSGD
from efsgd.compressors.lq_sgd import LQSGD
from efsgd.wire.collectives import AllToAll, Exchange, run
from efsgd.wire.compare import checksum
from efsgd.wire.transports import ProcessGroup

SHAPES = [(24, 16), (24, 16), (8, 3, 3, 3), (40, 30)]  # vectors would be added in gloo's own order
STEPS = 5


def make(aggregation: str) -> ErrorFeedbackSGD:
    """An optimizer over parameters that are the same for everyone."""
    generator = torch.Generator().manual_seed(7)
    parameters = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    compressor = LQSGD(rank=2, bits=5, aggregation=aggregation)
    return ErrorFeedbackSGD(parameters, lr=0.02, momentum=0.9, compressor=compressor)


def set_gradients(optimizer: ErrorFeedbackSGD, step: int, worker: int) -> None:
    """Made-up gradients of one worker."""
    generator = torch.Generator().manual_seed(1000 * step + worker)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def fingerprint(optimizer: ErrorFeedbackSGD) -> dict[str, list[int]]:
    """Checksums of parameters and of each kind of state."""
    found: dict[str, list[int]] = {}
    for parameter in optimizer.param_groups[0]["params"]:
        found.setdefault("parameters", []).append(checksum(parameter.detach()))
        for name, value in optimizer.state[parameter].items():
            found.setdefault(name, []).append(checksum(value.contiguous()))
    return found


def to_everyone(worker: int, world_size: int, dtype: torch.dtype) -> Exchange[list[list[float]]]:
    """One row for each worker, which says from whom and for whom it is."""
    rows = torch.tensor([[worker, other, 7] for other in range(world_size)], dtype=dtype)
    answer: Tensor = yield AllToAll(rows, "rows")
    return answer.tolist()


def main() -> None:
    """Entry point."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    transport = ProcessGroup()
    worker, world_size = transport.worker, transport.world_size
    results: dict[str, Any] = {
        "rows": [
            run(to_everyone(worker, world_size, dtype), transport)
            for dtype in (torch.uint8, torch.float32, torch.float64)
        ]
    }
    for aggregation in ("gather", "scatter"):
        optimizer = make(aggregation)
        for step in range(STEPS):
            set_gradients(optimizer, step, worker)
            optimizer.step()
        results[aggregation] = fingerprint(optimizer)
    dist.destroy_process_group()
    (Path(sys.argv[1]) / f"{worker}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
