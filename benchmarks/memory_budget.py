"""How many candidates can be measured side by side."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.candidates import Candidate


def available_memory(device: torch.device) -> float:
    """Bytes that are free on a device; infinity where that is not to be found out."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))


def sessions(
    listed: Sequence[Candidate],
    parameter_bytes: int,
    memory_bytes: float,
    always: Sequence[Candidate],
) -> Iterator[list[Candidate]]:
    """Splits candidates among sessions, so that those of one session fit in memory together.

    Args:
        listed: in order; neighbors stay together where they fit.
        parameter_bytes: of the workload.
        memory_bytes: for one worker.
        always: part of each session, since the others are compared with them.

    Yields:
        Candidates of one session, at least one of those listed.
    """
    # The gradients to hand over, the module that is shared, and what a step needs for a while.
    fixed = 1 + 3 + 4 + sum(candidate.footprint for candidate in always)
    session: list[Candidate] = []
    used = fixed
    for candidate in listed:
        if session and (used + candidate.footprint) * parameter_bytes > memory_bytes:
            yield [*always, *session]
            session, used = [], fixed
        session.append(candidate)
        used += candidate.footprint
    if session:
        yield [*always, *session]
