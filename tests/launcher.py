"""Starts Python programs of a test as processes, and collects what they report.

Loading torch takes a process longer than most tests need. So processes are forked from one that has
loaded it, and has done nothing else; several of them get the variables that torchrun would set.
Where torchrun itself is tested, or a process that is killed, tests start it themselves.
"""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 150  # seconds for a whole launch


def environment() -> dict[str, str]:
    """That of a worker: one thread, and this package's modules."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**os.environ, **offline, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Finished:
    """What became of programs: the exit status of each, and all that they printed."""

    returncodes: list[int | None]
    stdout: str
    stderr: str

    @property
    def returncode(self) -> int:
        """The first that is not 0."""
        return next((code for code in self.returncodes if code), 0)


def run_programs(
    command: Sequence[str],
    processes: int = 1,
    *,
    variables: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    ends_others: bool = True,
) -> Finished:
    """Runs a script with its arguments in one process, or in workers as torchrun starts them.

    Once one of them fails the others are ended as well, or not.
    """
    given = dict(variables or {})
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        given |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    context = multiprocessing.get_context("forkserver")
    _start_server(context)
    with TemporaryDirectory() as place:
        started = []
        for rank in range(processes):
            own = given if processes == 1 else {**given, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (list(command), own, str(folder), place)
            started.append(context.Process(target=_run, args=arguments))
            started[-1].start()
        returncodes = _wait_for(started, ends_others=ends_others)
        printed = [Path(place, name) for name in ("stdout", "stderr")]
        texts = [path.read_text() if path.exists() else "" for path in printed]
    return Finished(returncodes, *texts)


def launch(script: str, world_size: int, folder: Path, *task: str) -> list[dict[str, Any]]:
    """Runs a script in workers and returns their reports, in worker order.

    Its arguments are `task` and `folder`; worker w writes its report to `folder/w.json`.
    """
    done = run_programs([script, *task, str(folder)], world_size)
    assert done.returncode == 0, done.stderr
    reports = [folder / f"{worker}.json" for worker in range(world_size)]
    return [json.loads(report.read_text()) for report in reports]


def _start_server(context: Any) -> None:
    """Starts the process that is forked, with the environment of a worker."""
    context.set_forkserver_preload(["tests.preloaded"])
    before = dict(os.environ)
    os.environ.update(environment())
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _wait_for(started: Sequence[Any], *, ends_others: bool) -> list[int | None]:
    """The exit status of each; None of those that had to be ended."""
    end = time.monotonic() + LIMIT
    try:
        while True:
            codes = [process.exitcode for process in started]
            if None not in codes or (ends_others and any(codes)):
                return codes
            assert time.monotonic() < end, f"not finished after {LIMIT} s: {codes}"
            time.sleep(0.01)
    finally:
        for process in started:
            process.kill()
            process.join()


def _run(command: list[str], variables: dict[str, str], folder: str, place: str) -> None:
    """Becomes the program, with its own environment, folder and output."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.dup2(os.open(Path(place, name), flags, 0o600), number)
    os.environ.update(variables)
    os.chdir(folder)
    script, *arguments = command
    sys.argv, sys.path[0:0] = [script, *arguments], [str(Path(script).parent.absolute())]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
