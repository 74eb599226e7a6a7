"""One worker of one probe, in a process of its own."""

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.contract.made import PATIENCE, join
from benchmarks.contract.peers import CANDIDATES
from benchmarks.contract.questions import answer_of
from benchmarks.contract.rows import rows


def run(key: str, candidate: str, worker: int, folder: str, clones: list[str]) -> None:
    """Asks one question of one candidate, and writes the answer to a file named for the worker.

    Args:
        key: of the row.
        candidate: its name.
        worker: the number of this process.
        folder: for the answer, and for the workers to find each other.
        clones: directories from which peers are imported.
    """
    sys.path[:0] = clones
    # What libraries print is no answer, unless they end the process.
    log = os.open(f"{folder}/{worker}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    asked, adapter = rows()[key], CANDIDATES[candidate]
    names = {"RANK": worker, "WORLD_SIZE": asked.workers, "CONTRACT_STORE": f"{folder}/store"}
    os.environ.update({name: str(value) for name, value in names.items()})
    if asked.has_group and (asked.workers > 1 or adapter.needs_group):
        join()
    content = {**asdict(answer_of(asked, adapter)), "time": time.monotonic()}
    temporary = Path(folder) / f"{worker}.tmp"
    temporary.write_text(json.dumps(content))
    os.rename(temporary, Path(folder) / f"{worker}.json")
    end = time.monotonic() + 2 * PATIENCE
    while len(list(Path(folder).glob("*.json"))) < asked.workers and time.monotonic() < end:
        time.sleep(0.02)  # to the others this worker has not answered, and is not dead
    os._exit(0)  # a group whose other worker is stuck would not be left in an orderly way
