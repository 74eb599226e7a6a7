"""Makes the library of native passes for a rank, once on each machine.

What is made lies in a folder of the user's: `$EFSGD_CACHE`, else `efsgd` in `$XDG_CACHE_HOME` or
`~/.cache`. Its name says what it was made from, and its last bytes are a digest of the others.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = (HERE / "passes.cpp", HERE / "columns.h")
# No -march: what a library may use must not depend on the machine that makes it.
FLAGS = (
    *("-std=c++17", "-O3", "-mavx2", "-mfma", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti"),
    *("-fvisibility=hidden", "-fPIC", "-shared", "-pthread"),
)
_COMPILERS = ("g++", "clang++", "c++")
_SECONDS = 300.0  # for a compiler
_DIGEST_BYTES = hashlib.sha256().digest_size


class Unavailable(Exception):
    """There are no native passes here; says why."""


def require_processor() -> None:
    """Raises where what would be made could not run."""
    machine = platform.machine()
    if machine.lower() not in ("x86_64", "amd64") or sys.platform not in ("linux", "darwin"):
        raise Unavailable(f"it knows x86-64 on Linux and macOS, and this is {machine}")
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        raise Unavailable("the processor has no AVX2, or torch was told not to use it")


def ready_made(rank: int) -> Path:
    """Where the library is in a wheel that carries it."""
    return HERE / f"passes-{_hashed(rank)}.so"


def path_of(rank: int, compiler: list[str], folder: Path) -> Path:
    """Where the library is that this compiler makes."""
    try:
        asked = subprocess.run([*compiler, "--version"], capture_output=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{shlex.join(compiler)} does not run: {error}") from error
    return folder / f"passes-{_hashed(rank, *compiler, asked.stdout)}.so"


def compiler_at_hand() -> list[str]:
    """The command of a C++ compiler: that of the environment variable CXX, or one on the PATH."""
    given = shlex.split(os.environ.get("CXX", ""))
    for command in [given] if given else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            return command
    missing = f"CXX={given[0]}" if given else ", ".join(_COMPILERS)
    raise Unavailable(f"no C++ compiler was found ({missing})")


def is_intact(path: Path) -> bool:
    """Whether a library is there, as it was made; what was cut off would crash when it runs."""
    try:
        found = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(found[:-_DIGEST_BYTES]).digest() == found[-_DIGEST_BYTES:]


def make(rank: int, compiler: list[str], path: Path) -> None:
    """Compiles to `path`, in whose place the old file stays until the new one is whole."""
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    command = [*compiler, *FLAGS, f"-DRANK={rank}", str(SOURCES[0]), "-o", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode:
            reason = done.stderr.strip().partition("\n")[0] or f"status {done.returncode}"
            raise Unavailable(f"{shlex.join(compiler)} failed: {reason}")
        with open(name, "r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)  # the system's loader ignores what follows the last section
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{shlex.join(compiler)} failed: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(name)


@contextlib.contextmanager
def cache() -> Iterator[Path]:
    """A folder that no other user can write to: the cache, or one for this time alone."""
    try:
        folder = _cache_folder()
    except (OSError, RuntimeError):  # read-only, or without a home
        with tempfile.TemporaryDirectory(prefix="efsgd-") as name:
            yield Path(name)
        return
    yield folder


def _cache_folder() -> Path:
    given, home = os.environ.get("EFSGD_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(given) if given else Path(home or Path.home() / ".cache") / "efsgd"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022 or not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not this user's alone to write to.")
    return folder


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Others who want the same wait until it is made.

    Where nobody can lock, or for too long, several make it at once: a waste and nothing worse.
    """
    with open(path.with_suffix(".lock"), "w") as file:
        until = time.monotonic() + _SECONDS
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
            else:
                break
        yield


def _hashed(rank: int, *others: str | bytes) -> str:
    digest = hashlib.sha256(repr((rank, FLAGS, others)).encode())
    for source in SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:20]
