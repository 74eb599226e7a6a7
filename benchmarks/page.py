"""The page of the documentation that shows the results, as Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.candidates import Candidate
from benchmarks.growth import LARGE, SMALL, predictions
from benchmarks.kernels import taken
from benchmarks.namespaces import UNLIMITED
from benchmarks.network import BASELINE, FLOOR, SMALL_MESSAGE
from benchmarks.plots import label_of
from benchmarks.results import in_milliseconds, in_times
from benchmarks.timing import Quartiles, Row, compare, differences, ratios
from benchmarks.workloads import WORKLOADS, shapes_of

Result = Mapping[str, Any]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: text at the left, figures at the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def source_of(result: Result) -> str:
    """How the figures of a file came about: command, date, commit and machine."""
    machine = result["machine"]
    where = machine.get("device", machine["processor"])
    variables = "".join(f"{name}={value} " for name, value in machine["environment"].items())
    return (
        f"`{variables}{result['command']}`, {result['date']}, commit {result['commit']}, "
        f"on {where}, {machine['cores']} cores, torch {machine['torch']}, "
        f"{machine['threads']} thread(s) per process.\n"
    )


def panel_title(result: Result) -> str:
    """What distinguishes results of one workload from each other."""
    settings, machine = result["settings"], result["machine"]
    if result["benchmark"] == "network":
        return f"{settings['workers']} workers, {settings['rate']}"
    where = "" if settings["device"] == "cpu" else f"{settings['device']}, "
    kept = ""
    if machine["environment"]:
        kept = (
            ", large pages" if "THP_MEM_ALLOC_ENABLE" in machine["environment"] else ", memory kept"
        )
    return f"{where}{machine['threads']} thread(s){kept}"


def rows_of(result: Result, floor: str, baseline: str) -> list[tuple[Candidate, Row]]:
    """Candidates of all launches with their rows; those of every launch from the first one only.

    Args:
        result: of `network` or `local`.
        floor: name of forward and backward alone.
        baseline: name of what the others are compared with, within their launch.
    """
    found: dict[str, tuple[Candidate, Row]] = {}
    for launch in result["launches"]:
        candidates = {c.name: c for c in map(Candidate.from_json, launch["candidates"])}
        steps = {
            name: samples
            for name, samples in launch["samples"].items()
            if candidates[name].kind not in ("all-reduce", "copy")
        }
        for row in compare(steps, floor=floor, baseline=baseline):
            found.setdefault(row.name, (candidates[row.name], row))
    return list(found.values())


def network_table(result: Result) -> str:
    """Exchange and update on one network."""
    settings = result["settings"]
    shapes = shapes_of(settings["workload"])
    sent = {BASELINE.name: 4 * sum(map(math.prod, shapes))}
    for launch in result["launches"]:
        sent |= launch["bytes_sent"]
    rows = []
    for candidate, row in rows_of(result, FLOOR.name, BASELINE.name):
        size = sent.get(row.name)
        figures = (in_milliseconds(row.net), in_times(row.gain), _megabytes(size))
        rows.append((label_of(candidate), *figures))
    columns = ("", "exchange + update, ms", "faster than SGD", "sent, MB")
    title = f"**{WORKLOADS[settings['workload']]}**, {settings['workers']} workers"
    title += f", {links_of(result)}. {link_figures(result)}"
    return "\n".join((title, "", table(columns, rows), source_of(result)))


def links_of(result: Result) -> str:
    """The network, in words."""
    rate = result["settings"]["rate"]
    return "links without limit" if rate == UNLIMITED else f"links of {rate}"


def link_figures(result: Result) -> str:
    """What the link did in the same rounds."""
    launch = result["launches"][0]
    sizes = {
        c.nbytes[0]: Quartiles.of(launch["samples"][c.name])
        for c in map(Candidate.from_json, launch["candidates"])
        if c.kind == "all-reduce"
    }
    return "An all-reduce took " + " and ".join(
        f"{in_milliseconds(seconds)} ms "
        + ("when small" if size == SMALL_MESSAGE else f"with {size / 1e6:.1f} MB.")
        for size, seconds in sizes.items()
    )


def local_table(result: Result) -> str:
    """Steps of one worker."""
    samples: dict[str, tuple[list[float], list[float], list[float]]] = {}
    for launch in result["launches"]:
        found = launch["samples"]
        for name, seconds in found.items():
            samples.setdefault(name, (seconds, found["floor"], found["copy"]))
    copies = Quartiles.of(samples["copy"][0])
    rows: list[tuple[str, ...]] = [("a copy of as many bytes", in_milliseconds(copies), "", "1×")]
    for candidate, row in rows_of(result, "floor", "sgd-foreach"):
        seconds, floor, copy = samples[row.name]
        in_copies = Quartiles.of(ratios(differences(seconds, floor), copy))
        times = (in_milliseconds(row.net), in_times(row.cost), in_times(in_copies))
        rows.append((label_of(candidate), *times))
    columns = ["", "step, ms", "of SGD's time", "of a copy's time"]
    activity = [launch.get("activity", {}) for launch in result["launches"]]
    if any(activity):
        columns += ["kernels", "waits"]
        counts = {name: count for part in activity for name, count in part.items()}
        names = ["copy", *(row.name for _, row in rows_of(result, "floor", "sgd-foreach"))]
        rows = [
            (*cells, *(str(counts[name][what]) for what in ("kernels", "waits")))
            for cells, name in zip(rows, names, strict=True)
        ]
    title = f"**{WORKLOADS[result['settings']['workload']]}**, {panel_title(result)}"
    return "\n".join((title, "", table(columns, rows), source_of(result)))


def memory_table(result: Result) -> str:
    """Peaks of one workload."""
    columns = ("", "peak", "between steps", "peak, resident")
    rows = [
        (
            row["label"],
            *(f"{row[name]:.2f}×" if name in row else "" for name in ("peak", "kept", "resident")),
        )
        for row in memory_rows(result)
    ]
    title = f"**{WORKLOADS[result['settings']['workload']]}**"
    return "\n".join((title, "", table(columns, rows), source_of(result)))


def memory_rows(result: Result) -> list[dict[str, Any]]:
    """Figures of all candidates with their labels."""
    return [
        {**row, "label": label_of(Candidate.from_json(row["candidate"]))}
        for row in result["multiples"]
    ]


def ranks_table(result: Result) -> str:
    """Growth with the rank."""
    columns = ("rank", "sent, MB", "step of one worker, ms", "orthogonalization, ms")
    rows = [
        (
            str(row["rank"]),
            _megabytes(row["bytes_sent"]),
            in_milliseconds(Quartiles.of(row["step"])),
            in_milliseconds(Quartiles.of(row["orthogonalization"])),
        )
        for row in result["ranks"]
    ]
    title = f"**{WORKLOADS[result['settings']['workload']]}**"
    return "\n".join((title, "", table(columns, rows), source_of(result)))


def workers_table(result: Result) -> str:
    """Growth with the number of workers."""
    columns = ("", "workers", "measured, ms", "predicted, ms", "deviation")
    found = [
        (
            prediction.title,
            str(prediction.workers),
            in_milliseconds(prediction.seconds),
            f"{1e3 * prediction.predicted:.4g}",
            f"{100 * prediction.deviation:+.0f} %".replace("-", "−"),
        )
        for launch in result["launches"]
        for prediction in predictions(launch)
    ]
    probes = f"α from two all-reduces of {SMALL.nbytes[0]} bytes, "
    probes += f"B from two of {LARGE.nbytes[0]} bytes.\n"
    return "\n".join((table(columns, found), probes, source_of(result)))


def kernels_tables(result: Result) -> str:
    """Every way to do an operation; the one that efsgd takes in bold."""
    parts = []
    for operation in dict.fromkeys(row["operation"] for row in result["operations"]):
        same = [row for row in result["operations"] if row["operation"] == operation]
        ways = list(dict.fromkeys(way for row in same for way in row["samples"]))
        rows = []
        for row in same:
            (n, m), rank = row["shape"], row["rank"]
            cells = []
            for way in ways:
                samples = row["samples"].get(way)
                cell = "" if samples is None else f"{1e3 * Quartiles.of(samples).median:.3f}"
                chosen = cell and way in taken(operation, n, m, rank)
                cells.append(f"**{cell}**" if chosen else cell)
            rows.append((f"{n} × {m}", str(rank), *cells))
        heads = ("n × m", "rank", *(f"{way}, ms" for way in ways))
        parts.append(f"**{operation}**\n\n{table(heads, rows)}")
    return "\n".join((*parts, source_of(result)))


def _megabytes(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.3g}"
