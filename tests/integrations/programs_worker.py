"""What one worker of `test_programs.py` does: it trains, saves and resumes each program.

    python programs_worker.py RESULTS

Each worker writes RESULTS/worker.json.
"""

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from efsgd.wire.compare import checksum
from tests.integrations.programs import imagenet, mingpt, nanogpt

PROGRAMS: dict[str, Any] = {"nanogpt": nanogpt, "mingpt": mingpt, "imagenet": imagenet}


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors_in(value[key])
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def checksums(value: Any) -> list[int]:
    return [checksum(tensor.detach().contiguous()) for tensor in tensors_in(value)]


def run(program: Any, folder: Path, init_from: str) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, optimizer = program.main(folder, init_from)
    state = optimizer.state_dict()
    return {
        "parameters": checksums(list(model.parameters())),
        "state": checksums(state["state"]),
        "efsgd": checksums(state["efsgd"]),
        "errors": [float(s["error"].norm()) for s in state["efsgd"]["state"].values() if "q" in s],
        "warnings": [str(each.message) for each in caught],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results = Path(sys.argv[1])
    report = {
        f"{name}, {init_from}": run(program, results, init_from)
        for name, program in PROGRAMS.items()
        for init_from in ("scratch", "resume")
    }
    (results / f"{dist.get_rank()}.json").write_text(json.dumps(report))
    dist.destroy_process_group()
