"""What a row of the table is, how a probe asks for it, and what it may answer."""

import linecache
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Headings of the table, by the letter with which a row's key begins.
GROUPS = {
    "A": "Construction",
    "B": "The step",
    "C": "State and parameter groups",
    "D": "Checkpoints and copies",
    "E": "Hooks and profiler",
    "F": "Schedulers, mixed precision, frameworks",
    "G": "Flags of torch.optim.SGD",
    "H": "Several workers",
}

#: Seconds that a probe may take; a collective of it is waited for much less.
LIMIT = 60.0

_LONGEST = 160  # characters of an error that are quoted
# What is not the error: colors, lines of the libraries' sources, ports.
_NOISE = re.compile(r"\x1b\[\d*m|\[(?:enforce fail at )?/\S+:\d+\] |\[[\d.]+\]:\d+")
#: All rows whose probes have been imported, by key; see `benchmarks.contract.rows`.
REGISTERED: dict[str, "Row"] = {}


class Missed(AssertionError):
    """What the row asks for is not so; the text says what is."""


class NotApplicable(Exception):
    """The row makes no sense for this candidate; the text says why."""


class NotProbed(Exception):
    """This machine cannot tell; the text says what it would take."""


@dataclass(frozen=True)
class Row:
    """One line of the contract.

    Attributes:
        key: its group's letter, and its number there.
        title: what is asked for, in a phrase.
        meaning: what the probe does.
        workers: the number of processes that run it.
        has_group: whether they have a process group from the start.
        limit: seconds after which the answer is no.
        probe: takes an `Adapter`; raises where the answer is not yes, may return a remark.
    """

    key: str
    title: str
    meaning: str
    workers: int
    has_group: bool
    limit: float
    probe: Callable[[Any], str | None]


@dataclass(frozen=True)
class Answer:
    """One cell of the table.

    Attributes:
        answer: "yes", "no", "not applicable" or "not probed".
        reason: an error, a measured number, a remark; may be empty for "yes".
    """

    answer: str
    reason: str = ""


def row(
    key: str,
    title: str,
    meaning: str,
    *,
    workers: int = 1,
    has_group: bool = True,
    limit: float = LIMIT,
) -> Callable[[Callable[[Any], str | None]], Callable[[Any], str | None]]:
    """Makes a function the probe of a row; for the arguments see `Row`."""

    def register(probe: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        assert key not in REGISTERED, key
        REGISTERED[key] = Row(key, title, meaning, workers, has_group, limit, probe)
        return probe

    return register


def require(condition: object, otherwise: str) -> None:
    """Raises `Missed` with the text unless the condition holds."""
    if not condition:
        raise Missed(otherwise)


def stage(text: str) -> None:
    """Says what a probe does next: if the process is aborted, that is part of the reason."""
    print(f"stage: {text}", file=sys.stderr, flush=True)


def answer_of(asked: Row, adapter: Any) -> Answer:
    """Runs the probe of a row on a candidate, in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return Answer("yes", asked.probe(adapter) or "")
        except NotApplicable as reason:
            return Answer("not applicable", str(reason))
        except NotProbed as reason:
            return Answer("not probed", str(reason))
        except Exception as error:
            return Answer("no", describe_error(error))


def describe_error(error: BaseException) -> str:
    """The beginning of its text; where it has none, the line that raised it."""
    if isinstance(error, Missed):
        return str(error)
    lines = [line.strip() for line in _NOISE.sub("", str(error)).splitlines() if line.strip()]
    if lines:
        text = _shortened(lines[0])
    else:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        line = linecache.getline(frame.filename, frame.lineno or 0).strip()
        text = f"{line} ({Path(frame.filename).name})"
    return f"{type(error).__name__}: {text}"


def describe_abort(log: str) -> str:
    """Why a process was aborted, from what it has printed: the text of a C++ exception."""
    before, _, words = _NOISE.sub("", log).rpartition("what():")
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    stages = [line[len("stage: ") :] for line in before.splitlines() if line.startswith("stage: ")]
    where = f"{stages[-1]}: " if stages else ""
    return f"{where}a worker was aborted: {_shortened(lines[0]) if lines else 'no words'}"


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rstrip()} ..."
