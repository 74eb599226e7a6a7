"""Runs probes in processes of their own, and reads what they answer."""

import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.contract import child
from benchmarks.contract.questions import Answer, describe_abort
from benchmarks.contract.rows import rows

#: What is imported once, and not by each probe.
PRELOADED = ["benchmarks.contract.child", "benchmarks.contract.probes", "torch._dynamo"]


def ask(key: str, candidate: str, clones: Sequence[str] = (), limit: float | None = None) -> Answer:
    """The answer of one candidate to one row.

    Args:
        key: of the row.
        candidate: its name.
        clones: directories from which peers are imported.
        limit: seconds after which the answer is no; None is the row's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    count = rows()[key].workers
    limit = rows()[key].limit if limit is None else limit
    if count > 1 and candidate == "sgd":
        return Answer("not applicable", "it has one worker")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=child.run, args=(key, candidate, n, folder, list(clones)))
            for n in range(count)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + limit
        try:
            for process in processes:
                process.join(max(0.0, end - time.monotonic()))
            hung = any(process.is_alive() for process in processes)
            aborted = [n for n, p in enumerate(processes) if (p.exitcode or 0) < 0]
        finally:
            for process in processes:
                process.kill()
                process.join()
        found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
        last_words = [(Path(folder) / f"{n}.log").read_text() for n in aborted]
    if last_words:
        return Answer("no", describe_abort(last_words[0]))
    return summary(found, count, limit if hung else None)


def summary(found: Sequence[dict[str, Any]], count: int, limit: float | None) -> Answer:
    """One answer of all workers': the first no, if there is one.

    Args:
        found: what the workers wrote.
        count: the number of workers.
        limit: seconds within which one did not end; None if all did.
    """
    found = sorted(found, key=lambda content: content["time"])
    negative = [content for content in found if content["answer"] == "no"]
    if negative or len(found) == count:
        content = (negative or found)[0]
        return Answer(content["answer"], content["reason"])
    if limit is not None:
        return Answer("no", f"it did not end within {limit:.0f} s")
    return Answer("no", "a process ended without an answer")


def ask_all(
    keys: Sequence[str], candidates: Sequence[str], clones: Sequence[str] = (), jobs: int = 2
) -> dict[str, dict[str, Answer]]:
    """Answers by row and candidate.

    Args:
        keys: of rows.
        candidates: by name.
        clones: directories from which peers are imported.
        jobs: how many questions are asked at a time.
    """
    cells = [(key, candidate) for key in keys for candidate in candidates]
    with ThreadPoolExecutor(jobs) as pool:
        answers = list(pool.map(lambda cell: ask(*cell, clones), cells))
    found: dict[str, dict[str, Answer]] = {key: {} for key in keys}
    for (key, candidate), answer in zip(cells, answers, strict=True):
        found[key][candidate] = answer
    return found
