"""Loads the library of native passes for a rank, and makes sure that it computes what it should."""

import _ctypes
import contextlib
import ctypes
import functools
import itertools
import warnings
from ctypes import CDLL, POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any, cast

from efsgd.algorithms.low_rank.native import build

_STRIDES = ("count", "n", "m", "p_matrix", "p_row", "p_column")
_POINTERS = ("d", "e", "p", "q", "own", "g", "x", "w", "is_half")


class Batch(Structure):
    """As in `passes.cpp`."""

    _fields_ = [*((n, c_int64) for n in _STRIDES), *((n, c_void_p) for n in _POINTERS)]


class Rule(Structure):
    """As in `passes.cpp`."""

    _fields_ = [
        *((name, c_float) for name in ("c", "decay", "lambda_", "a", "t", "lr")),
        *((name, c_int32) for name in ("begins", "mixes", "writes")),
    ]


@functools.cache
def library(rank: int) -> CDLL | None:
    """The passes for a rank, made here if they must be; None, after a warning, if they cannot be.

    The answer holds for the life of the process.
    """
    try:
        build.require_processor()
        own = build.ready_made(rank)
        if build.is_intact(own):
            with contextlib.suppress(OSError):  # of an older system than that it was made on
                return _loaded(own, rank)
        compiler = build.compiler_at_hand()
        with build.cache() as folder:
            path = build.path_of(rank, compiler, folder)
            with build.one_at_a_time(path):
                for _ in range(2):
                    if build.is_intact(path):
                        with contextlib.suppress(OSError):  # of a system that shares the folder
                            return _loaded(path, rank)
                    build.make(rank, compiler, path)
                return _loaded(path, rank)
    except (build.Unavailable, OSError) as error:
        _warn(str(error))
        return None


def _loaded(path: Path, rank: int) -> CDLL:
    found = CDLL(str(path))
    for name, argument in (("add_and_project", c_float), ("descend", POINTER(Rule))):
        getattr(found, name).argtypes = [POINTER(Batch), c_int64, c_int64, argument]
    for name in ("back_project", "subtract"):
        getattr(found, name).argtypes = [POINTER(Batch), c_int64, c_int64]
    for name in ("add_and_project", "back_project", "subtract", "descend"):
        getattr(found, name).restype = None
    if not computes_well(found, rank):
        _ctypes.dlclose(found._handle)
        raise OSError(f"{path} computes something else than it should")
    return found


@functools.cache
def _warn(reason: str) -> None:  # once in a process
    warnings.warn(
        f"compile=True cannot do what it should: {reason}. Steps run without it, with the same "
        f"results to rounding. On a CPU it needs an x86-64 processor with AVX2 and a C++ compiler "
        f"such as g++. Install one, or leave compile out.",
        stacklevel=2,
    )


def computes_well(passes: Any, rank: int) -> bool:
    """Takes one step by small whole numbers, in which nothing is rounded, and looks at all of it.

    Two matrices [9, 11] of that rank: blocks of rows and what is left of them, eight columns and
    what is left of them.
    """
    count, n, m, r = 2, 9, 11, rank
    numbers = itertools.cycle((1, -2, 0, 3, -1, 2, 1, 0, -3))

    def some(length: int) -> Any:
        return (c_float * length)(*itertools.islice(numbers, length))

    e, p, q, g, x, w = (some(count * k) for k in (n * m, n * r, r * m, n * m, n * m, n * m))
    d, own = some(count * n * m), some(count * r * m)
    batch = Batch(count, n, m, n * r, r, 1)
    for name, values in (("d", d), ("e", e), ("p", p), ("q", q), ("own", own)):
        setattr(batch, name, ctypes.addressof(values))
    kept: list[Any] = []
    for name, values in (("g", g), ("x", x), ("w", w)):
        kept.append((c_void_p * count)(*(ctypes.addressof(values) + 4 * k * n * m for k in (0, 1))))
        setattr(batch, name, ctypes.addressof(kept[-1]))
    kept.append((c_int64 * count)())
    batch.is_half = ctypes.addressof(kept[-1])

    def product(k: int, i: int, j: int) -> float:
        left, right = p[(k * n + i) * r :][:r], q[k * r * m :][: r * m]
        return cast(float, sum(left[s] * right[s * m + j] for s in range(r)))

    def at(k: int, i: int, j: int) -> int:
        return (k * n + i) * m + j

    places = list(itertools.product(range(count), range(n), range(m)))
    deltas = [e[at(*place)] + 2 * g[at(*place)] for place in places]
    right = list(q)
    passes.add_and_project(byref(batch), 1, 1, 2.0)
    good = list(d) == deltas and list(p) == [
        sum(deltas[at(k, i, j)] * right[(k * r + s) * m + j] for j in range(m))
        for k, i, s in itertools.product(range(count), range(n), range(r))
    ]
    p[:] = [*itertools.islice(numbers, len(p))]
    passes.back_project(byref(batch), 1, 1)
    good = good and list(q) == list(own) == [
        sum(p[(k * n + i) * r + s] * deltas[at(k, i, j)] for i in range(n))
        for k, s, j in itertools.product(range(count), range(r), range(m))
    ]
    passes.subtract(byref(batch), 1, 1)
    good = good and list(d) == [deltas[at(*place)] - product(*place) for place in places]
    u = [-product(*place) + 2 * x[at(*place)] for place in places]
    momenta = [3 * before + 2 * new for before, new in zip(w, u, strict=True)]
    ends = [y - 2 * (new + 2 * v) for y, new, v in zip(x, u, momenta, strict=True)]
    passes.descend(byref(batch), 1, 1, byref(Rule(-1, 2, 3, 2, 2, 2, 0, 1, 0)))
    return good and list(w) == momenta and list(x) == ends
