r"""How long collectives take on a network of given latency and bandwidth: the α–β model.

**Ring.** gloo's all-reduce, as torch calls it, is a ring. Each of W workers cuts its buffer of S
bytes into W chunks. In W − 1 rounds every worker passes one chunk to its neighbor, which adds its
own; in W − 1 more rounds the sums go around. A chunk goes in two segments (in more where they would
exceed a megabyte), so that one of them is on its way while the other is waited for and added.

A segment takes S/(2WB) at bandwidth B, and arrives a latency α after it was sent. It can be passed
on when it has arrived and when the link is free of the segment before it. Where segments are
longer than the latency, the link is never idle; where they are shorter, one segment is sent while
the other one's latency passes. So a round with a chunk of C bytes takes the longer of two times,
max(C/B, α + C/(2B)), and an all-reduce

    T(S) = 2 (W − 1) max(S / (W B), α + S / (2 W B)).

An all-gather is W − 1 such rounds, in which the chunks are the workers' whole buffers.

**Tree.** NCCL's double binary tree has two trees, of which each carries half of the bytes up and
down again, so that the latency passes as often as a tree is high, and each worker still sends as
much as in a ring:

    T(S) = 2 ⌈log₂ W⌉ α + 2 (W − 1) / W · S / B.

Gathering has no such tree: all-gathers are rings there, too.

A latency here is all that a round costs whatever its size: the wire, the kernel, and waiting for a
core to run on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from efsgd.checks import require_choice, require_integer, require_number

ALGORITHMS = "ring", "tree"


@dataclass(frozen=True)
class Link:
    """A link between each worker and the others.

    Attributes:
        workers: W, at least 2.
        latency: α, seconds for each round, at least 0.
        bandwidth: B, bytes per second in each direction, above 0.
        algorithm: of the all-reduce, "ring" or "tree".

    Raises:
        ValueError: one of them is out of range.
    """

    workers: int
    latency: float
    bandwidth: float
    algorithm: str = "ring"

    def __post_init__(self) -> None:
        require_integer("workers", self.workers, 2, remedy="One worker sends nothing.")
        in_seconds = "It is in seconds: 0.2 ms are 0.0002."
        require_number("latency", self.latency, remedy=in_seconds)
        in_bytes = "It is in bytes per second: 1 Gbit/s are 125e6."
        require_number("bandwidth", self.bandwidth, above=0, remedy=in_bytes)
        require_choice("algorithm", self.algorithm, ALGORITHMS, remedy="gloo's is a ring.")

    @classmethod
    def measured(
        cls,
        workers: int,
        small: tuple[int, float],
        large: tuple[int, float],
        algorithm: str = "ring",
    ) -> Self:
        """The link on which two all-reduces took as long as they did.

        Args:
            workers: W.
            small: bytes and seconds of an all-reduce.
            large: of another one, of more bytes.
            algorithm: of both.

        Raises:
            ValueError: the larger one was not slower, so that bandwidth cannot be told.

        Example:
            >>> from efsgd.planning import Link
            >>> Link.measured(2, small=(0, 0.002), large=(1000, 0.012))
            Link(workers=2, latency=0.001, bandwidth=83333.33333333333, algorithm='ring')
        """
        (small_bytes, small_seconds), (large_bytes, large_seconds) = small, large
        if large_bytes <= small_bytes or large_seconds <= small_seconds:
            raise ValueError(
                f"{large_bytes} bytes took {large_seconds} s and {small_bytes} bytes "
                f"{small_seconds} s, but more bytes must take longer: measure on a quieter "
                f"machine, or with a larger buffer"
            )
        more_bytes, more_seconds = large_bytes - small_bytes, large_seconds - small_seconds
        sent = 2 * (workers - 1) / workers  # by each worker, for a byte of its buffer
        if algorithm == "tree":
            bandwidth = sent * more_bytes / more_seconds
            latency = max(0.0, small_seconds - sent * small_bytes / bandwidth)
            return cls(workers, latency / rounds_of(workers, "tree"), bandwidth, algorithm)
        rounds = rounds_of(workers, "ring")
        bandwidth = sent * large_bytes / large_seconds
        link = cls(workers, small_seconds / rounds, bandwidth, algorithm)
        if link.seconds(large_bytes) > large_seconds:  # its latency was not hidden
            bandwidth = sent * more_bytes / 2 / more_seconds
        latency = max(0.0, small_seconds / rounds - small_bytes / (2 * workers * bandwidth))
        return cls(workers, latency, bandwidth, algorithm)

    def seconds(self, nbytes: float) -> float:
        """What an all-reduce takes.

        Args:
            nbytes: S, of the buffer of each worker.

        Example:
            >>> from efsgd.planning import Link
            >>> link = Link(workers=4, latency=0.5, bandwidth=1000.0)
            >>> link.seconds(8000), link.seconds(2000)  # 2 s per chunk; 0.5 s, and half as much
            (12.0, 4.5)
            >>> Link(workers=4, latency=0.5, bandwidth=1000.0, algorithm="tree").seconds(8000)
            14.0
        """
        rounds = rounds_of(self.workers, self.algorithm)
        if self.algorithm == "tree":
            sent = 2 * (self.workers - 1) / self.workers * nbytes
            return rounds * self.latency + sent / self.bandwidth
        return rounds * self._round(nbytes / self.workers)

    def gather_seconds(self, nbytes: float) -> float:
        """What an all-gather takes, of so many bytes of each worker.

        Example:
            >>> from efsgd.planning import Link
            >>> Link(workers=4, latency=0.5, bandwidth=1000.0).gather_seconds(2000)
            6.0
        """
        return (self.workers - 1) * self._round(nbytes)

    def exchange_seconds(self, nbytes: float) -> float:
        """What an all-to-all takes, where each worker has so many bytes for all together."""
        sent = (self.workers - 1) / self.workers * nbytes
        return (self.workers - 1) * self.latency + sent / self.bandwidth

    def seconds_of(self, kind: str, nbytes: float) -> float:
        """What a collective takes, named as the class in `efsgd.wire.collectives`."""
        times: dict[str, Callable[[float], float]] = {
            "AllReduceMean": self.seconds,
            "AllGather": self.gather_seconds,
            "AllToAll": self.exchange_seconds,
        }
        if kind not in times:
            raise ValueError(f"No time is known of {kind}. Of these there is: {', '.join(times)}.")
        return times[kind](nbytes)

    def _round(self, chunk: float) -> float:
        """One round of a ring, in which every worker passes on this many bytes."""
        return max(chunk / self.bandwidth, self.latency + chunk / (2 * self.bandwidth))


def rounds_of(workers: int, algorithm: str) -> int:
    """How often a latency passes in an all-reduce.

    Example:
        >>> from efsgd.planning.alpha_beta import rounds_of
        >>> rounds_of(10_000, "ring"), rounds_of(10_000, "tree")
        (19998, 28)
    """
    return 2 * (math.ceil(math.log2(workers)) if algorithm == "tree" else workers - 1)
