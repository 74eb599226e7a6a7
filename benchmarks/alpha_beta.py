r"""How long an all-reduce takes on a network of given latency and bandwidth: the α–β model.

gloo's all-reduce, as torch calls it, is a ring. Each of W workers cuts its buffer of S bytes into W
chunks. In W − 1 rounds every worker passes one chunk to its neighbor, which adds its own; in W − 1
more rounds the sums go around. A chunk goes in two segments (in more where they would exceed a
megabyte), so that one of them is on its way while the other is waited for and added.

A segment takes S/(2WB) at bandwidth B, and arrives a latency α after it was sent. It can be passed
on when it has arrived and when the link is free of the segment before it. Where segments are
longer than the latency, the link is never idle; where they are shorter, one segment is sent while
the other one's latency passes. So a round takes the longer of two times, and an all-reduce

    T(S) = 2 (W − 1) max(S / (W B), α + S / (2 W B)).

A latency here is all that a round costs whatever its size: the wire, the kernel, and waiting for a
core to run on.
"""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Link:
    """A link between each worker and its neighbor in a ring.

    Attributes:
        workers: W, at least 2.
        latency: α, seconds for each round.
        bandwidth: B, bytes per second.
    """

    workers: int
    latency: float
    bandwidth: float

    @classmethod
    def measured(cls, workers: int, small: tuple[int, float], large: tuple[int, float]) -> Self:
        """The link on which two all-reduces took as long as they did.

        Args:
            workers: W.
            small: bytes and seconds of an all-reduce.
            large: of another one, of more bytes.

        Raises:
            ValueError: the larger one was not slower, so that bandwidth cannot be told.

        Example:
            >>> Link.measured(2, small=(0, 0.002), large=(1000, 0.012))
            Link(workers=2, latency=0.001, bandwidth=83333.33333333333)
        """
        (small_bytes, small_seconds), (large_bytes, large_seconds) = small, large
        if large_bytes <= small_bytes or large_seconds <= small_seconds:
            raise ValueError(
                f"{large_bytes} bytes took {large_seconds} s and {small_bytes} bytes "
                f"{small_seconds} s, but more bytes must take longer: measure on a quieter "
                f"machine, or with a larger buffer"
            )
        rounds = 2 * (workers - 1)
        bandwidth = rounds * large_bytes / workers / large_seconds
        link = cls(workers, small_seconds / rounds, bandwidth)
        if link.seconds(large_bytes) > large_seconds:  # its latency was not hidden
            more_bytes, more_seconds = large_bytes - small_bytes, large_seconds - small_seconds
            bandwidth = rounds * more_bytes / (2 * workers) / more_seconds
        latency = small_seconds / rounds - small_bytes / (2 * workers * bandwidth)
        return cls(workers, latency, bandwidth)

    def seconds(self, nbytes: int) -> float:
        """What an all-reduce takes.

        Args:
            nbytes: S, of the buffer of each worker.

        Example:
            >>> link = Link(workers=4, latency=0.5, bandwidth=1000.0)
            >>> link.seconds(8000), link.seconds(2000)  # 2 s per chunk; 0.5 s, and half as much
            (12.0, 4.5)
        """
        segment = nbytes / (2 * self.workers * self.bandwidth)
        return 2 * (self.workers - 1) * max(2 * segment, self.latency + segment)
