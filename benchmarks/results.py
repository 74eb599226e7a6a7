"""Results as JSON files: samples, settings, and the machine they were measured on."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import Quartiles
from examples.reporting import save_json

ROOT = Path(__file__).parents[1]


def commit_of(directory: Path) -> str | None:
    """The commit that is checked out there; None where that is not to be found out."""
    # Root asks about the files of another user, which git allows only where it is told.
    git = ["git", "-c", "safe.directory=*", "-C", str(directory)]
    command = [*git, "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def describe_machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """The machine and its software.

    Args:
        threads: of torch, in each process.
        device: on which the steps were.
    """
    found = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("MALLOC_", "THP_MEM_"))
        },
    }
    if device != "cpu":
        found["device"] = torch.cuda.get_device_name(device)
    return found


def write_results(
    path: Path | None,
    benchmark: str,
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    found: Mapping[str, Any],
) -> None:
    """Writes what was measured, and how to measure it again.

    Args:
        path: of the JSON file; None writes nothing.
        benchmark: name of the module.
        machine: of `describe_machine`.
        settings: what was asked for.
        found: what was measured.
    """
    if path is None:
        return
    content = {
        "benchmark": benchmark,
        "command": command_of(benchmark, sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit_of(ROOT),
        "machine": dict(machine),
        "settings": dict(settings),
        **found,
    }
    save_json(path, content)


def command_of(benchmark: str, arguments: Sequence[str]) -> str:
    """The command to measure the same elsewhere: without this machine's paths.

    Args:
        benchmark: name of the module.
        arguments: of the command line.

    Example:
        >>> command_of("local", ["--epfml", "/home/me/powersgd", "--output", "a.json"])
        'python -m benchmarks.local --epfml DIR'
    """
    words = ["python", "-m", f"benchmarks.{benchmark}"]
    for before, word in zip(["", *arguments], arguments, strict=False):
        if word != "--output" and before != "--output":
            words.append("DIR" if before in ("--epfml", "--dion") else word)
    return shlex.join(words)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; the first column is text, the others are figures."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    # Where the output is a file, a line may be as long as it likes.
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def in_milliseconds(seconds: Quartiles) -> str:
    """Median and quartiles, as "12.3 (11.9 to 13.0)"."""
    ms = seconds.scaled(1e3)
    return f"{ms.median:.4g} ({ms.low:.4g} to {ms.high:.4g})"


def in_times(ratio: Quartiles) -> str:
    """The same for a ratio, as "3.21× (3.10 to 3.30)"."""
    return f"{ratio.median:.3g}× ({ratio.low:.3g} to {ratio.high:.3g})"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
