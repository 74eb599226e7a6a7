r"""How long an all-reduce takes on a network of given latency and bandwidth: the α–β model.

gloo's all-reduce, as torch calls it, is a ring. Each of W workers cuts its buffer of S bytes into W
chunks. In W − 1 rounds every worker passes one chunk to its neighbor, which adds its own; in W − 1
more rounds the sums go around. A round lasts one latency α, and as long as S/W bytes take at
bandwidth B, so that

    T(S) = 2 (W − 1) (α + S / (W B)).

A latency here is all that a round costs whatever its size: the wire, the kernel, and waiting for a
core to run on.
"""

from dataclasses import dataclass
from typing import Self

__all__ = ["Link"]


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
            Link(workers=2, latency=0.001, bandwidth=100000.0)
        """
        more_bytes, more_seconds = large[0] - small[0], large[1] - small[1]
        if more_bytes <= 0 or more_seconds <= 0:
            raise ValueError(
                f"{large[0]} bytes took {large[1]} s and {small[0]} bytes {small[1]} s, but more "
                f"bytes must take longer: measure on a quieter machine, or with a larger buffer"
            )
        rounds = 2 * (workers - 1)
        bandwidth = rounds / workers * more_bytes / more_seconds
        return cls(workers, small[1] / rounds - small[0] / (workers * bandwidth), bandwidth)

    def seconds(self, nbytes: int) -> float:
        """What an all-reduce takes.

        Args:
            nbytes: S, of the buffer of each worker.

        Example:
            >>> Link(workers=4, latency=0.001, bandwidth=1e6).seconds(4000)
            0.012
        """
        return 2 * (self.workers - 1) * (self.latency + nbytes / self.workers / self.bandwidth)
