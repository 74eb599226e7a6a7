"""Starts the workers of a test as processes, and collects what they report."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 150  # seconds for a whole launch, of which loading torch takes most


def environment() -> dict[str, str]:
    """That of a worker: one thread, and this package's modules."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def launch(script: str, world_size: int, folder: Path, *task: str) -> list[dict[str, Any]]:
    """Runs a script under torchrun and returns the reports of its workers, in worker order.

    Its arguments are `task` and `folder`; worker w writes its report to `folder/w.json`.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world_size}", script, *task, str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    reports = [folder / f"{worker}.json" for worker in range(world_size)]
    return [json.loads(report.read_text()) for report in reports]
