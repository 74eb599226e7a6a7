"""A plan as people read it: a table in plain text, and advice in words."""

import math
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from efsgd.planning.advice import Plan

#: By how much the model may be wrong: what `make bench-planning` holds it to.
TOLERANCE = 0.25
# From these on a range has no end, or no beginning: the ends of what is looked at.
_ALL_BANDWIDTHS, _ALL_WORKERS = (1e3, 1e13), (2, 100_000)


def in_time(seconds: float) -> str:
    """Seconds as people write them.

    Example:
        >>> from efsgd.planning.words import in_time
        >>> in_time(0.0123), in_time(2.5), in_time(0.00002), in_time(0)
        ('12.3 ms', '2.5 s', '0.02 ms', '0 ms')
    """
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def in_bytes(nbytes: float) -> str:
    """Bytes in units of 10^3.

    Example:
        >>> from efsgd.planning.words import in_bytes
        >>> in_bytes(619_896), in_bytes(44_695_848), in_bytes(12)
        ('620 kB', '44.7 MB', '12 B')
    """
    return _scaled(nbytes, ("B", "kB", "MB", "GB", "TB"))


def in_bits(bandwidth: float) -> str:
    """A bandwidth in bits per second.

    Example:
        >>> from efsgd.planning.words import in_bits
        >>> in_bits(125e6), in_bits(12.34e6)
        ('1 Gbit/s', '98.7 Mbit/s')
    """
    return _scaled(8 * bandwidth, ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"))


def _scaled(value: float, units: Sequence[str]) -> str:
    power = 0
    while float(f"{value:.3g}") >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {units[power]}" if value < 1000 else f"{value:.0f} {units[power]}"


def bandwidths_in_words(ranges: Sequence[tuple[float, float]]) -> str:
    """Ranges of bandwidths.

    Example:
        >>> from efsgd.planning.words import bandwidths_in_words
        >>> bandwidths_in_words([(1e3, 125e6)]), bandwidths_in_words([])
        ('up to 1 Gbit/s', 'none')
    """
    return _in_words(ranges, _ALL_BANDWIDTHS, in_bits)


def workers_in_words(ranges: Sequence[tuple[float, float]]) -> str:
    """Ranges of numbers of workers.

    Example:
        >>> from efsgd.planning.words import workers_in_words
        >>> workers_in_words([(2, 64)]), workers_in_words([(8, 100_000)])
        ('up to 64', 'from 8')
    """
    return _in_words(ranges, _ALL_WORKERS, lambda number: f"{number:,.0f}")


def _in_words(ranges, ends, word) -> str:  # type: ignore[no-untyped-def]
    parts = []
    for first, last in ranges:
        is_open, is_endless = first <= ends[0], last >= ends[1] * (1 - 1e-9)
        if is_open and is_endless:
            return "any"
        if is_open:
            parts.append(f"up to {word(last)}")
        elif is_endless:
            parts.append(f"from {word(first)}")
        else:
            parts.append(f"{word(first)} to {word(last)}")
    return ", ".join(parts) or "none"


def shown(plan: "Plan") -> str:
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


def describe(plan: "Plan", gathered: Container[str]) -> str:
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
