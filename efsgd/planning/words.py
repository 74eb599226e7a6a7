"""Numbers as people read them."""

from collections.abc import Callable, Sequence

# From these on a range has no end, or no beginning: the ends of what is looked at.
_ALL_BANDWIDTHS, _ALL_WORKERS = (1e3, 1e13), (2, 100_000)


def in_time(seconds: float) -> str:
    """Seconds as people write them.

    Example:
        >>> from efsgd.planning.words import in_time
        >>> in_time(0.0123), in_time(2.5), in_time(0.00002), in_time(0)
        ('12.3 ms', '2.5 s', '0.02 ms', '0 ms')
    """
    if seconds >= 100:
        return f"{seconds:,.0f} s"
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


def _in_words(
    ranges: Sequence[tuple[float, float]],
    ends: tuple[float, float],
    word: Callable[[float], str],
) -> str:
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
