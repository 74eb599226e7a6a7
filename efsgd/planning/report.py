"""A plan as people read it: a table in plain text, and advice in words."""

import dataclasses
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from efsgd.planning.alpha_beta import Link
from efsgd.planning.measuring import Work
from efsgd.planning.prediction import Setup
from efsgd.planning.words import bandwidths_in_words, in_bits, in_bytes, in_time, workers_in_words

#: By how much the model may be wrong: what `make bench-planning` holds it against.
TOLERANCE = 0.25


@dataclass(frozen=True)
class Row:
    """One candidate.

    Attributes:
        name: of the candidate.
        bytes_sent: what one worker hands to collectives in a step, control words included.
        collectives: of a step; both are means over steps that are not alike.
        compute: what a worker computes besides forward and backward, seconds.
        seconds: of a whole step.
        speed_up: how many times as long a step under DDP takes.
        bandwidths: ranges in bytes per second in which it is faster than DDP, with these workers.
        workers: ranges of numbers of workers in which it is, with this bandwidth.
        memory: bytes that are kept beyond parameters and gradients, momentum included.
    """

    name: str
    bytes_sent: float
    collectives: float
    compute: float
    seconds: float
    speed_up: float
    bandwidths: tuple[tuple[float, float], ...]
    workers: tuple[tuple[float, float], ...]
    memory: int


@dataclass(frozen=True)
class Plan:
    """What `advise` has found. `str()` of it is a table and the advice.

    Attributes:
        setup: the model, and its passes.
        link: the network.
        work: what is computed in a step by candidate; "SGD" is SGD's update.
        ddp: seconds of a step under DDP.
        alone: seconds of a step that sends nothing.
        rows: the candidates.
        best: the name of the one to use; None: do not compress.
        advice: the same in words.
    """

    setup: Setup
    link: Link
    work: dict[str, Work]
    ddp: float
    alone: float
    rows: tuple[Row, ...]
    best: str | None
    advice: str

    def __str__(self) -> str:
        return shown(self)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain dicts, lists, strings and numbers, in bytes and seconds.

        Its entry "compute" may be given to `advise` as `compute`, on any machine.
        """
        trained = self.setup.trained
        return {
            "parameters": sum(map(math.prod, trained.shapes)),
            "tensors": len(trained.shapes),
            "gradient_bytes": trained.nbytes,
            "link": dataclasses.asdict(self.link),
            "forward": self.setup.forward,
            "backward": self.setup.backward,
            "compute": {name: list(dataclasses.astuple(w)) for name, w in self.work.items()},
            "ddp": self.ddp,
            "alone": self.alone,
            "candidates": [dataclasses.asdict(row) for row in self.rows],
            "best": self.best,
            "advice": self.advice,
        }


def shown(plan: Plan) -> str:
    """The table and the advice."""
    trained, link, setup = plan.setup.trained, plan.link, plan.setup
    parameters = sum(map(math.prod, trained.shapes))
    head = (
        f"{parameters:,} parameters in {len(trained.shapes):,} tensors, gradients of "
        f"{in_bytes(trained.nbytes)}; {link.workers:,} workers, {in_bits(link.bandwidth)}, latency "
        f"{in_time(link.latency)}, all-reduce by {link.algorithm}; forward {in_time(setup.forward)}"
        f", backward {in_time(setup.backward)}"
    )
    columns = (
        "",
        "sent",
        "collectives",
        "compute",
        "step",
        "speed-up",
        "pays at bandwidths",
        "pays with workers",
        "memory",
    )
    update = in_time(setup.update.step)
    buckets = f"{len(trained.buckets())}"
    # Momentum, and DDP's buckets.
    kept = in_bytes(2 * trained.nbytes)
    lines = [("DDP and SGD", in_bytes(trained.nbytes), buckets, update, in_time(plan.ddp))]
    table = [(*lines[0], "1", "", "", kept)]
    for row in plan.rows:
        table.append(
            (
                row.name,
                in_bytes(row.bytes_sent),
                f"{row.collectives:g}",
                in_time(row.compute),
                in_time(row.seconds),
                f"{row.speed_up:.2f}",
                bandwidths_in_words(row.bandwidths),
                workers_in_words(row.workers),
                in_bytes(row.memory),
            )
        )
    nothing = ("nothing sent", "0 B", "0", update, in_time(plan.alone))
    table.append((*nothing, f"{plan.ddp / max(plan.alone, 1e-12):.2f}", "", "", ""))
    return "\n".join((head, "", *aligned([columns, *table]), "", plan.advice))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: text at the left, figures at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def describe(plan: Plan, gathered: Container[str]) -> str:
    """What to use, and why."""
    fastest = min(plan.rows, key=lambda row: row.seconds, default=None)
    if fastest is None:
        return "There is no candidate to compare with DDP."
    waiting = in_time(max(0.0, plan.ddp - plan.alone))
    if plan.best is None:
        text = (
            f"Do not compress. A step under DDP takes {in_time(plan.ddp)}, of which it waits "
            f"{waiting} for the network; with {fastest.name}, the fastest of these, it would take "
            f"{in_time(fastest.seconds)}."
        )
        if fastest.bandwidths:
            at = bandwidths_in_words(fastest.bandwidths)
            text += f" With {plan.link.workers:,} workers it pays at {at}."
        return text + (_doubt() if fastest.speed_up > 1 / (1 + TOLERANCE) else "")
    best = next(row for row in plan.rows if row.name == plan.best)
    text = (
        f"Use {best.name}. A step takes {in_time(best.seconds)}, and {in_time(plan.ddp)} under "
        f"DDP, of which it waits {waiting} for the network: {best.speed_up:.2f} times as long. It "
        f"pays at {_any(bandwidths_in_words(best.bandwidths), 'bandwidth')} with "
        f"{plan.link.workers:,} workers, and at {in_bits(plan.link.bandwidth)} with "
        f"{_any(workers_in_words(best.workers), 'number of')} workers."
    )
    if best.name in gathered:
        text += " What each worker receives grows with their number."
    if fastest.seconds < 0.9 * best.seconds:
        text += f" {fastest.name} would be faster, {in_time(fastest.seconds)}: compare quality."
    return text + (_doubt() if best.speed_up < 1 + TOLERANCE else "")


def _any(words: str, what: str) -> str:
    return f"any {what}" if words == "any" else words


def _doubt() -> str:
    percent = f"{100 * TOLERANCE:.0f} %"
    return f" That is less than predictions may be wrong by, {percent}: measure both."
