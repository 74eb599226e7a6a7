"""Starts the processes of a test."""

import subprocess
from typing import Any

# torch 2.13 with gloo now and then aborts in its own destructors when a process that has finished
# its work exits on a crowded machine. Nothing that is tested here has gone wrong then.
ABORTED_AT_EXIT = "terminate called without an active exception"


def run_patiently(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run with captured text, once more where torch aborted at exit."""
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, **options)
        if done.returncode == 0 or ABORTED_AT_EXIT not in done.stderr:
            break
    return done
