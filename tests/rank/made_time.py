"""Workers in one thread whose time is made up: of a network and of a computation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from efsgd import ErrorFeedbackSGD
from efsgd.rank import RankPolicy, RankScheduler
from efsgd.testing import Lockstep, lockstep
from efsgd.wire.collectives import Collective, Exchange, intercept
from tests.simulation import parameters_of
from tests.strategies import Shape, gaussian

T = TypeVar("T")


@dataclass
class MadeClock:
    """Time passes when somebody says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class MadeWorkers:
    """Optimizers and schedulers of all workers; each worker has a clock of its own."""

    optimizers: Sequence[ErrorFeedbackSGD]
    policies: Callable[[MadeClock], RankPolicy] | None = None
    latency: float = 0.0
    seconds_per_byte: float = 0.0
    computation: Sequence[float] = (1.0,)  # seconds, of each worker in turn
    clocks: list[MadeClock] = field(init=False)
    schedulers: list[RankScheduler] = field(init=False)
    steps: int = 0

    def __post_init__(self) -> None:
        self.clocks = [MadeClock(100.0 * worker) for worker, _ in enumerate(self.optimizers)]
        pairs = zip(self.optimizers, self.clocks, strict=True)
        make = self.policies
        self.schedulers = [RankScheduler(o, make(clock)) for o, clock in pairs] if make else []

    def train(self, steps: int) -> list[int]:
        """The bytes that each step sends."""
        found = []
        for _ in range(steps):
            for worker in range(len(self.optimizers)):
                self.clocks[worker].now += self.computation[worker % len(self.computation)]
                for index, p in enumerate(parameters_of(self.optimizers[worker])):
                    made = gaussian(tuple(p.shape), worker, self.steps, index)
                    p.grad = made.to(p.dtype) if p.requires_grad else None
            count = len(self.optimizers)
            self.run([own.exchange(count, worker) for worker, own in enumerate(self.optimizers)])
            found.append(self.optimizers[0].communication_stats()["bytes_sent"])
            self.steps += 1
        return found

    def window(self, steps: int) -> Lockstep[None]:
        """Some steps, and a decision: what the decision sends."""
        self.train(steps)
        return self.decide()

    def decide(self, fail_at: int | None = None) -> Lockstep[None]:
        count = len(self.schedulers)
        exchanges = [own.exchange(count, worker) for worker, own in enumerate(self.schedulers)]
        return self.run(exchanges, fail_at=fail_at)

    def run(self, exchanges: Sequence[Exchange[T]], fail_at: int | None = None) -> Lockstep[T]:
        """Drives exchanges; their collectives take as long as the network says."""
        slowed = [self._slowed(own, worker) for worker, own in enumerate(exchanges)]
        return lockstep(slowed, fail_at=fail_at)

    def ranks(self) -> list[list[float]]:
        """The values that are set, on each worker."""
        return [list(scheduler.get_last_ranks().values()) for scheduler in self.schedulers]

    def _slowed(self, exchange: Exchange[T], worker: int) -> Exchange[T]:
        def outgoing(collective: Collective) -> None:
            nbytes = collective.buffer.numel() * collective.buffer.element_size()
            self.clocks[worker].now += self.latency + self.seconds_per_byte * nbytes

        return intercept(exchange, outgoing)


def optimizers(
    shapes: Sequence[Shape], world_size: int, compressor: Any, **options: Any
) -> list[ErrorFeedbackSGD]:
    """Of workers with equal parameters, all zeros."""
    dtypes = options.pop("dtypes", [torch.float32] * len(shapes))
    found = []
    for _ in range(world_size):
        pairs = zip(shapes, dtypes, strict=True)
        own = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape, dtype in pairs]
        found.append(ErrorFeedbackSGD(own, lr=0.1, compressor=compressor, **options))
    return found
