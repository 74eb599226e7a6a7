"""How long a whole step takes: forward, backward, exchange and update.

Under DistributedDataParallel a bucket is sent as soon as its last gradient is there and the one
before it has arrived, while the backward pass goes on; the update follows the last bucket. An
optimizer of this package compresses after the backward pass, and waits for each collective before
the next; what it computes while Q travels is counted as if nothing travelled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from efsgd.planning.alpha_beta import Link
from efsgd.planning.measuring import Work
from efsgd.planning.sending import Sending
from efsgd.planning.tensors import Trained


@dataclass(frozen=True)
class Setup:
    """What all candidates have in common.

    Attributes:
        trained: the tensors.
        forward: seconds of a forward pass.
        backward: seconds of a backward pass.
        update: what SGD computes after it.
    """

    trained: Trained
    forward: float
    backward: float
    update: Work

    def seconds_alone(self) -> float:
        """A step that sends nothing."""
        return self.forward + self.backward + self.update.step

    def seconds_of_ddp(self, link: Link) -> float:
        """A step under DistributedDataParallel, uncompressed.

        Example:
            >>> from efsgd.planning.prediction import Link, Setup, Trained, Work
            >>> # A bucket of 2 MiB half-way through the backward pass, one of 2 MiB at its end.
            >>> trained = Trained(((2**19,), (2**19,)), (4, 4))
            >>> link = Link(workers=2, latency=0.0, bandwidth=2.0**20)
            >>> Setup(trained, 1.0, 4.0, Work(0.5)).seconds_of_ddp(link)  # 1 + 2 + 2 + 2 + 0.5
            7.5
        """
        done = self.forward
        for part, nbytes in self.trained.buckets():
            done = max(done, self.forward + part * self.backward) + link.seconds(nbytes)
        return max(done, self.forward + self.backward) + self.update.step

    def seconds_of(self, sending: Sending, work: Work, link: Link) -> float:
        """A step that compresses, in the mean over its kinds."""
        travelling = sum(
            often * sum(link.seconds_of(each.kind, each.nbytes) for each in messages)
            for often, messages in sending.messages(link.workers)
        )
        return self.forward + self.backward + work.seconds(link.workers) + travelling


def ranges_where(
    holds: Callable[[float], bool], points: Sequence[float], *, integers: bool = False
) -> tuple[tuple[float, float], ...]:
    """Where something holds: ranges of a variable, looked for at some points, ends bisected.

    Args:
        holds: for a value of the variable.
        points: rising. What holds at one of them only, or between two, may be missed.
        integers: whether the variable, and all points, are integers.

    Returns:
        First and last value of each range in which it holds; those of the first and last point
        stand for all beyond.

    Example:
        >>> from efsgd.planning.prediction import ranges_where
        >>> ranges_where(lambda n: 3 <= n < 70, [1, 10, 100, 1000], integers=True)
        ((3, 69),)
    """
    found: list[list[float]] = []
    before = False
    for index, point in enumerate(points):
        now = holds(point)
        if now and not before:
            first = point if index == 0 else _edge(holds, point, points[index - 1], integers)
            found.append([first, point])
        elif now:
            found[-1][1] = point
        elif before:
            found[-1][1] = _edge(holds, points[index - 1], point, integers)
        before = now
    return tuple((first, last) for first, last in found)


def _edge(holds: Callable[[float], bool], inside: float, outside: float, integers: bool) -> float:
    """The last value, from `inside` on towards `outside`, for which it holds."""
    for _ in range(50):
        if integers and abs(inside - outside) <= 1:
            break
        middle = (inside + outside) // 2 if integers else (inside * outside) ** 0.5
        if holds(middle):
            inside = middle
        else:
            outside = middle
    return inside
