"""A network of its own for each worker, on one Linux machine.

Each worker lives in a network namespace with one interface. All of them are joined by a bridge in
one more namespace, and each link is limited in both directions, as if every worker were a machine
at a switch. Nothing is left in the machine's own network, and nothing of it is changed.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

PREFIX = "efsgd-bench-"  # namespaces of these names are ours, also those of a killed run
SWITCH = f"{PREFIX}switch"
INTERFACE = "eth0"
PORT = 29_511
UNLIMITED = "unlimited"
# A link that was idle may send this much at once: little, since it costs no time. Timers of the
# kernel miss too much of the rate with less, and so they do with packets that do not fit in.
BURST_SECONDS, PACKET_BYTES = 0.5e-3, 16 * 1024
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
ROOT = Path(__file__).parents[1]
LOCK = Path(tempfile.gettempdir()) / f"{PREFIX}lock"


class MissingPrerequisite(Exception):
    """Network namespaces cannot be made here."""


class WorkerFailure(Exception):
    """A worker ended badly or not in time."""


def check_prerequisites() -> None:
    """Checks what network namespaces need.

    Raises:
        MissingPrerequisite: says what, in one line.
    """
    if not sys.platform.startswith("linux"):
        raise MissingPrerequisite("Network namespaces need Linux; this is another system.")
    if os.geteuid() != 0:
        raise MissingPrerequisite("Network namespaces need root: run this with sudo.")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise MissingPrerequisite(f"`{tool}` is not installed: install the package iproute2.")


def checked_rate(text: str) -> str:
    """A rate of links in the terms of tc, or "unlimited".

    Raises:
        ValueError: it is none.
    """
    if text != UNLIMITED and not re.fullmatch(r"[1-9]\d*[kmg]bit", text):
        raise ValueError(f"rate {text!r} is none: give one like 100mbit, 1gbit or {UNLIMITED}")
    return text


def bytes_per_second(rate: str) -> float:
    """What a link of this rate carries, headers included.

    Example:
        >>> bytes_per_second("100mbit")
        12500000.0
    """
    if rate == UNLIMITED:
        return math.inf
    return int(rate[:-4]) * UNITS[rate[-4:]] / 8


class Network:
    """Context in which workers can be started, each in its own namespace.

    Args:
        workers: how many, 1 to 200.
        rate: of each link, see `checked_rate`.

    Raises:
        MissingPrerequisite: another benchmark is running.
    """

    def __init__(self, workers: int, rate: str) -> None:
        self.workers, self.rate = workers, checked_rate(rate)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_exclusive())
            stack.enter_context(_termination_as_exit())
            stack.callback(remove_namespaces)
            remove_namespaces()
            self._create()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, job: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        """Runs one job on all workers.

        Args:
            job: for `benchmarks.worker`, or for the module that its "module" names.
            timeout: seconds until all workers must have ended.

        Returns:
            What worker 0 has written.

        Raises:
            WorkerFailure: with the last words of the worker that failed first.
        """
        with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
            result, given = Path(folder, "result.json"), Path(folder, "job.json")
            given.write_text(json.dumps({**job, "timeout": timeout, "output": str(result)}))
            try:
                for worker in reversed(range(self.workers)):
                    self._processes.append(self._start(worker, given))
                _await(self._processes, timeout, Path(folder))
            finally:
                self._stop()
            found: dict[str, Any] = json.loads(result.read_text())
            return found

    def _start(self, worker: int, job: Path) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": _address(0),
            "MASTER_PORT": str(PORT),
            "RANK": str(worker),
            "WORLD_SIZE": str(self.workers),
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "OMP_NUM_THREADS": "1",
        }
        module = json.loads(job.read_text()).get("module", "benchmarks.worker")
        python = [sys.executable, "-m", module, str(job)]
        # Worker 0 shows the progress; what the others say is shown when they fail.
        with open(job.with_name(f"worker{worker}"), "wb") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", _namespace(worker), *python],
                cwd=ROOT,
                env=environment,
                stderr=None if worker == 0 and sys.stderr.isatty() else log,
                start_new_session=True,  # Ctrl-C is for this process, which then stops the workers
            )

    def _stop(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it has started itself
        for process in self._processes:
            process.wait()
        self._processes.clear()

    def _create(self) -> None:
        _ip("netns", "add", SWITCH)
        _ip("link", "add", "bridge", "type", "bridge", namespace=SWITCH)
        _ip("link", "set", "bridge", "up", namespace=SWITCH)
        for worker in range(self.workers):
            own, port = _namespace(worker), f"port{worker}"
            _ip("netns", "add", own)
            peer = ("peer", "name", INTERFACE, "netns", own)
            _ip("link", "add", port, "type", "veth", *peer, namespace=SWITCH)
            _ip("link", "set", port, "master", "bridge", "up", namespace=SWITCH)
            _ip("address", "add", f"{_address(worker)}/24", "dev", INTERFACE, namespace=own)
            for interface in ("lo", INTERFACE):
                _ip("link", "set", interface, "up", namespace=own)
            _limit(own, INTERFACE, self.rate)
            _limit(SWITCH, port, self.rate)


def measured(workers: int, rate: str, job: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Runs one job on a network of its own; ends the program where that cannot be done.

    Raises:
        SystemExit: says why, with exit code 2 where network namespaces cannot be made, else 1.
    """
    try:
        check_prerequisites()
        with Network(workers, rate) as network:
            return network.run(job, timeout)
    except (MissingPrerequisite, WorkerFailure) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2 if isinstance(error, MissingPrerequisite) else 1) from None


def remove_namespaces() -> None:
    """Removes all namespaces of ours, with their interfaces and whatever runs in them."""
    with _undisturbed():
        for line in _ip("netns", "list").splitlines():
            name = line.split()[0]
            if name.startswith(PREFIX):
                for process in _ip("netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(process), signal.SIGKILL)
                _ip("netns", "delete", name)


def _await(processes: Sequence[subprocess.Popen[bytes]], timeout: float, logs: Path) -> None:
    deadline = time.monotonic() + timeout
    workers = dict(zip(reversed(range(len(processes))), processes, strict=True))
    while any(process.poll() is None for process in processes):
        failed = [worker for worker, process in workers.items() if process.poll()]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for worker, process in workers.items():
        if code := process.poll():
            words = (logs / f"worker{worker}").read_text().strip()[-2000:]
            raise WorkerFailure(f"Worker {worker} ended with exit code {code}.\n{words}")
    if any(process.poll() is None for process in processes):
        raise WorkerFailure(f"The workers did not finish in {timeout:.0f} s: give more --timeout.")


def _namespace(worker: int) -> str:
    return f"{PREFIX}{worker}"


def _address(worker: int) -> str:
    return f"10.77.0.{worker + 1}"


def _limit(namespace: str, interface: str, rate: str) -> None:
    if rate == UNLIMITED:
        return
    burst = max(PACKET_BYTES, int(BURST_SECONDS * bytes_per_second(rate)))
    bucket = ("tbf", "rate", rate, "burst", str(burst), "latency", "50ms")
    _run("tc", "-netns", namespace, "qdisc", "add", "dev", interface, "root", *bucket)
    packet = ("gso_max_size", str(PACKET_BYTES))
    _ip("link", "set", "dev", interface, *packet, namespace=namespace)


def _ip(*arguments: str, namespace: str | None = None) -> str:
    return _run("ip", *(() if namespace is None else ("-netns", namespace)), *arguments)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def _exclusive() -> Iterator[None]:
    """One network at a time: another would share its names and spoil its times."""
    with open(LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MissingPrerequisite(
                f"Another network benchmark is running (it holds {LOCK}): wait for its end."
            ) from None
        yield


@contextlib.contextmanager
def _termination_as_exit() -> Iterator[None]:
    """SIGTERM ends this process as an exception does, so that it cleans up."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No signal of the keyboard or of `kill` interrupts what happens here."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
