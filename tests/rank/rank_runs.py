"""Workers with rank schedulers, all in one thread, and gradients of exact norms."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd import PowerSGDOptimizer
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
    """Some workers, each with an optimizer and a scheduler; each parameter has its own group."""

    def __init__(
        self,
        policies: Callable[[], RankPolicy],
        world_size: int = 1,
        shapes: Sequence[Sequence[int]] = (SQUARE,),
        make: Callable[..., Any] = PowerSGDOptimizer,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        self.optimizers: list[Any] = []
        for _ in range(world_size):
            own = [torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in shapes]
            given = {"lr": 1.0, **options}
            given = {name: value for name, value in given.items() if value is not None}
            self.optimizers.append(make(self.groups(own), **given))
        self.schedulers = [RankScheduler(each, policies()) for each in self.optimizers]

    def groups(self, parameters: list[Tensor]) -> list[Any]:
        return [{"params": [each]} for each in parameters]

    @property
    def ranks(self) -> list[Any]:
        """Those of worker 0, in the order of the parameters, as they stand in the groups."""
        return individual(self.optimizers[0], self.schedulers[0].policy.setting)

    @property
    def values(self) -> list[Any]:
        """Those of worker 0, for each parameter that is decided on."""
        return list(self.schedulers[0].get_last_ranks().values())

    def step(self, gradients: Sequence[Sequence[Tensor | None]]) -> list[Traced]:
        return step_with(self.optimizers, gradients)

    def step_alike(self, *norms: float) -> list[Traced]:
        """A step in which all workers have gradients of these norms, one for each parameter."""
        shapes = [p.shape for p in parameters_of(self.optimizers[0])]
        own = [of_norm(norm, shape) for norm, shape in zip(norms, shapes, strict=True)]
        return self.step([own for _ in self.optimizers])

    def window_alike(self, *norms: float) -> list[Any]:
        """`step_alike`, and a decision: the ranks then."""
        self.step_alike(*norms)
        self.decide()
        return self.ranks

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


def ready(policies: Callable[[], RankPolicy] = accordion, world_size: int = 2) -> Team:
    """Workers on `SHAPES` that have taken a step."""
    team = Team(policies, world_size, SHAPES)
    step_once(team)
    return team


def step_once(team: Team) -> list[Traced]:
    """A step in which all gradients have a norm of 4."""
    return team.step_alike(*[4.0] * len(SHAPES))


@contextlib.contextmanager
def nothing_changes(team: Team) -> Iterator[None]:
    """Checks that all is as before at the end."""
    before = all_of(team)
    yield
    assert all_of(team) == before


def run_windows(team: Team, first: int, last: int, seed: int = 0) -> list[Any]:
    """Windows of two steps on `SHAPES`, and what is decided after each.

    Gradients differ between workers. Now and then they change by much.
    """
    return go_on(team, 2 * first, 2 * last, functools.partial(made_gradients, seed=seed))


def go_on(
    team: Team, first: int, last: int, gradients: Callable[[int, int, int], Any] | None = None
) -> list[Any]:
    """Steps, from one number to another, with a decision after every second of them."""
    gradients = made_gradients if gradients is None else gradients
    decided = []
    for number in range(first, last):
        window, step = divmod(number, 2)
        team.step([gradients(window, step, worker) for worker in range(len(team.optimizers))])
        if step == 1:
            team.decide()
            decided.append(team.ranks)
    return decided


def made_gradients(window: int, step: int, worker: int, seed: int = 0) -> list[Tensor]:
    """One worker's gradients in one step of `run_windows`."""
    scale = 10.0 if window % 3 == 2 else 1.0 + 0.05 * window
    return [scale * gaussian(s, window, step, worker, i, seed) for i, s in enumerate(SHAPES)]
