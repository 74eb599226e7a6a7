"""The library of native passes is made once, made anew where it is broken, and done without."""

import hashlib
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from efsgd.algorithms.low_rank.native import build, library
from tests.algorithms.test_native import RANKS, SMALL, _library, a_team, gradients  # noqa: F401
from tests.simulation import step_with


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Nothing is known of earlier tests, nor later of these."""
    for known in (library.library, library._warn):
        known.cache_clear()
    yield
    for known in (library.library, library._warn):
        known.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """A compiler that hands out what the true one has made, and says how often it did."""
    assert library.library(1) is not None
    library.library.cache_clear()
    with build.cache() as folder:
        true = build.path_of(1, build.compiler_at_hand(), folder)
        made = true.read_bytes()[: -build._DIGEST_BYTES]
    (tmp_path / "made.so").write_bytes(made)
    script, log = tmp_path / "c++", tmp_path / "log"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1; exit; fi\n'
        f'echo made >> {log}\nsleep 0.1\nfor last; do :; done\ncp {tmp_path}/made.so "$last"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setenv("EFSGD_CACHE", str(tmp_path / "cache"))
    return lambda: len(log.read_text().split()) if log.exists() else 0


def cached(folder: Path) -> Path:
    [found] = (folder / "cache").glob("*.so")
    return found


def test_it_is_made_once(compiler: Callable[[], int], tmp_path: Path) -> None:
    for _ in range(2):
        assert library.library(1) is not None
        library.library.cache_clear()
    assert compiler() == 1
    assert build.is_intact(cached(tmp_path))
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def sealed(data: bytes) -> bytes:
    return data + hashlib.sha256(data).digest()


@pytest.mark.parametrize(
    "breaks",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:5000] + bytes(8) + data[5008:],
        lambda data: b"",
        lambda data: sealed(b"of another system"),
    ],
    ids=["cut off", "changed", "empty", "of another system"],
)
def test_a_broken_one_is_made_anew(
    breaks: Callable[[bytes], bytes], compiler: Callable[[], int], tmp_path: Path
) -> None:
    whole = sealed((tmp_path / "made.so").read_bytes())
    with build.cache() as folder:
        path = build.path_of(1, build.compiler_at_hand(), folder)
    path.write_bytes(breaks(whole))
    assert library.library(1) is not None
    assert compiler() == 1 and path.read_bytes() == whole


def run_forked(number: int) -> list[int]:
    """The exit statuses of so many processes that want the library at once."""
    children = []
    for _ in range(number):
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if library.library(1) is not None else 3)
            finally:
                os._exit(4)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a fork that leaves torch as it is")
@pytest.mark.parametrize("locks", [True, False])
def test_several_processes_want_it_at_once(
    locks: bool, compiler: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not locks:

        def refuses(*_: Any) -> None:
            raise OSError("no locks on this file system")

        monkeypatch.setattr("fcntl.flock", refuses)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons: of threads
        assert run_forked(3) == [0, 0, 0]
    assert compiler() == 1 if locks else compiler() >= 1
    assert build.is_intact(cached(tmp_path))
    names = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert names == {".so", ".lock"}  # nothing half made is left


def test_what_others_can_write_to_is_not_used(compiler: Callable[[], int], tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    assert library.library(1) is not None
    assert compiler() == 1 and list(folder.iterdir()) == []


def test_a_wheel_may_carry_it(
    compiler: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried = tmp_path / "carried.so"
    carried.write_bytes(sealed((tmp_path / "made.so").read_bytes()))
    monkeypatch.setattr(build, "ready_made", lambda rank: carried)
    assert library.library(1) is not None
    assert compiler() == 0


def one_warning(reason: str) -> None:
    """Steps of two workers go on as without, and one of them says why."""
    workers = a_team()
    with pytest.warns(UserWarning, match="compile=True cannot do what it should") as record:
        for step in range(2):
            step_with(workers, [gradients(step, worker) for worker in range(2)])
    texts = [str(w.message) for w in record if "compile=True" in str(w.message)]
    assert len(texts) == 1 and reason in texts[0] and "g++" in texts[0]
    assert all(worker.engine.plan.numerics == ("eager",) for worker in workers)


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("EFSGD_CACHE", str(tmp_path))
    one_warning("no C++ compiler was found (g++, clang++, c++)")


@pytest.mark.parametrize("made", [None, "another"])
def test_a_compiler_that_fails(
    made: str | None, compiler: Callable[[], int], tmp_path: Path
) -> None:
    script = tmp_path / "c++"
    if made is None:
        script.write_text("#!/bin/sh\n[ $1 = --version ] || { echo out of paper >&2; exit 1; }\n")
        one_warning("out of paper")
        return
    # The passes of rank 1 are no passes of rank 4.
    one_warning("computes something else than it should")


@pytest.mark.parametrize("reason", ["no AVX2", "aarch64"])
def test_another_processor(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "no AVX2":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    else:
        monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    one_warning(reason)


@pytest.mark.slow
def test_every_rank_computes_well() -> None:
    assert shutil.which("c++") or os.environ.get("CXX")
    for rank in range(1, 9):
        assert library.library(rank) is not None
