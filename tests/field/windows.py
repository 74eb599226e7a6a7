"""Policies that decide on ranks in the machine, and what they must have summed up of steps."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd import PowerSGDOptimizer
from efsgd.rank import Accordion, LGreCo, RankPolicy, RankScheduler
from efsgd.testing import lockstep
from tests.rank.rank_policies import Drawn
from tests.simulation import difference

#: By name; those that sum errors, too, sum up all steps of a window.
POLICIES: dict[str, Callable[[], RankPolicy]] = {
    "accordion": lambda: Accordion(low=1, high=2, interval=1),
    "l_greco": lambda: LGreCo(Accordion(low=1, high=2, interval=1), observations=1000),
    "own": Drawn,
}
#: Sums of a window, of numbers about 1, in float64.
ROUNDING = 1e-7


class Windows:
    """The schedulers of all workers with one policy, and sums of what each worker brings.

    Sums are those of gradients, and those of gradients and errors, by the parameters' numbers.
    """

    def __init__(self, policy: str, optimizers: Sequence[PowerSGDOptimizer]) -> None:
        self.schedulers = [RankScheduler(o, POLICIES[policy]()) for o in optimizers]
        self.begin()

    def begin(self) -> None:
        """A window begins."""
        self.sums: dict[tuple[int, bool, int], Tensor] = {}

    def add(self, worker: int, number: int, gradient: Tensor, error: Tensor) -> None:
        """A step has taken these from a worker."""
        for with_errors in (False, True):
            sums = self.sums.setdefault((worker, with_errors, number), torch.zeros_like(error))
            sums += gradient + error if with_errors else gradient

    def check(self, number_of: Callable[[Tensor], int]) -> None:
        """What policies have summed up is what was added, where it stands now."""
        for worker, scheduler in enumerate(self.schedulers):
            parameters = {n: p for p, n in scheduler._numbers._numbers.items()}
            for accumulator in scheduler.policy.accumulators:
                for index, found in accumulator.sums.items():
                    key = worker, accumulator._with_errors, number_of(parameters[index])
                    expected = self.sums.get(key, torch.zeros_like(found))
                    apart = difference(found.view(expected.shape), expected)
                    assert apart < ROUNDING, (key, apart)

    def decide(self, step: int, fail_at: int | None) -> None:
        """The policy decides, and a window begins; nothing does where no step was taken."""
        pairs, count = enumerate(self.schedulers), len(self.schedulers)
        lockstep([s.exchange(count, worker) for worker, s in pairs], fail_at=fail_at)
        if self.schedulers[0]._last_step == step:
            self.begin()

    # ---- checkpoints ----------------------------------------------------------------------------

    def saved(self) -> list[Any]:
        """Of each worker, with the sums and ranks that go with it."""
        return [
            (
                s.state_dict(),
                s.get_last_ranks(),
                {k[1:]: v for k, v in self.sums.items() if k[0] == w},
            )
            for w, s in enumerate(self.schedulers)
        ]

    def consolidated(self) -> Any:
        """One for all workers, with the means of the sums."""
        count = len(self.schedulers)
        pairs = enumerate(self.schedulers)
        found = lockstep([s.consolidation(count, worker) for worker, s in pairs])
        sums: dict[tuple[bool, int], Tensor] = {}
        for (_, *key), value in self.sums.items():
            own = sums.setdefault((bool(key[0]), int(key[1])), torch.zeros_like(value))
            own += value / count
        return found.results[0], self.schedulers[0].get_last_ranks(), sums

    def load(self, saved: Sequence[Any]) -> None:
        """What `saved` or, for each worker, `consolidated` returned."""
        self.begin()
        for worker, (scheduler, own) in enumerate(zip(self.schedulers, saved, strict=True)):
            state_dict, ranks, sums = own
            scheduler.load_state_dict(state_dict)
            assert scheduler.get_last_ranks() == ranks
            self.sums |= {(worker, *key): value.clone() for key, value in sums.items()}

    def close(self) -> None:
        """Before optimizers get other schedulers."""
        for scheduler in self.schedulers:
            scheduler.close()
