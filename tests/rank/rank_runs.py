"""Workers with rank schedulers, all in one thread, and gradients of exact norms."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd import ErrorFeedbackSGD, PowerSGDOptimizer
from efsgd.rank import Accordion, RankPolicy, RankScheduler
from efsgd.testing import Traced, lockstep
from tests.simulation import bits, parameters_of, snapshot, step_with
from tests.strategies import gaussian

#: 256 elements, so that a constant gradient has 16 times its element as its norm, exactly.
SQUARE = (16, 16)

#: Three that are compressed, and one that is not.
SHAPES = [SQUARE, (24, 12), (10,), (8, 3, 3, 3)]


def of_norm(norm: float, shape: Sequence[int] = SQUARE) -> Tensor:
    """A constant float64 tensor of this norm."""
    size = torch.Size(shape).numel()
    return torch.full(tuple(shape), norm / size**0.5, dtype=torch.float64)


def individual(optimizer: torch.optim.Optimizer, setting: str = "rank") -> list[Any]:
    """What each parameter has of its own; None where it has what its group has."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        found += (group["per_parameter"] or {}).get(setting, [None] * len(group["params"]))
    return found


class Team:
    """Some workers with a scheduler each.

    Attributes:
        optimizers: of each worker.
        schedulers: of each worker.

    Args:
        policies: makes a worker's policy.
        world_size: the number of workers.
        shapes: of the parameters, each in a group of its own.
        make: makes a worker's optimizer from its groups.
    """

    def __init__(
        self,
        policies: Callable[[], RankPolicy],
        world_size: int = 1,
        shapes: Sequence[Sequence[int]] = (SQUARE,),
        make: Callable[..., ErrorFeedbackSGD] = PowerSGDOptimizer,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        options = {"lr": 1.0, **options}
        self.optimizers, self.schedulers = [], []
        for _ in range(world_size):
            own = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
            self.optimizers.append(make([{"params": [each]} for each in own], **options))
        for optimizer in self.optimizers:
            self.schedulers.append(RankScheduler(optimizer, policies()))

    @property
    def ranks(self) -> list[Any]:
        """Those of worker 0, in the order of the parameters, as they stand in the groups."""
        return individual(self.optimizers[0], self.schedulers[0].policy.setting)

    def step(self, gradients: Sequence[Sequence[Tensor | None]]) -> list[Traced]:
        """A step with `gradients[w][i]`."""
        return step_with(self.optimizers, gradients)

    def step_alike(self, *norms: float) -> list[Traced]:
        """A step in which all workers have gradients of these norms, one for each parameter."""
        shapes = [p.shape for p in parameters_of(self.optimizers[0])]
        own = [of_norm(norm, shape) for norm, shape in zip(norms, shapes, strict=True)]
        return self.step([own for _ in self.optimizers])

    def set_lr(self, *lrs: float) -> None:
        """Of each group, on all workers."""
        for optimizer in self.optimizers:
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr

    def decide(self, fail_at: int | None = None) -> list[Traced]:
        """Ends a window: `RankScheduler.step` of all workers."""
        count = len(self.schedulers)
        exchanges = [s.exchange(count, worker) for worker, s in enumerate(self.schedulers)]
        return lockstep(exchanges, fail_at=fail_at).trace

    def consolidated(self) -> list[dict[str, Any]]:
        """`RankScheduler.consolidated_state_dict` of all workers."""
        count = len(self.schedulers)
        return lockstep([s.consolidation(count, w) for w, s in enumerate(self.schedulers)]).results


def accordion(**options: Any) -> Accordion:
    """A policy that decides after each window."""
    return Accordion(**{"low": 1, "high": 3, "interval": 1, **options})


def all_of(team: Team) -> Any:
    """All that a decision may change, as bits."""
    saved = [scheduler.state_dict() for scheduler in team.schedulers]
    return bits([snapshot(team.optimizers), saved])


def run_windows(team: Team, first: int, last: int, seed: int = 0) -> list[Any]:
    """Windows of two steps on `SHAPES`, and what is decided after each.

    Gradients differ between workers. Now and then they change by much.
    """
    decided = []
    for window in range(first, last):
        for step in range(2):
            team.step([made_gradients(window, step, w, seed) for w in range(len(team.optimizers))])
        team.decide()
        decided.append(team.ranks)
    return decided


def made_gradients(window: int, step: int, worker: int, seed: int = 0) -> list[Tensor]:
    """One worker's gradients in one step of `run_windows`."""
    scale = 10.0 if window % 3 == 2 else 1.0 + 0.05 * window
    return [scale * gaussian(s, seed, window, step, worker, i) for i, s in enumerate(SHAPES)]
