"""Workers with L-GreCo, all in one thread, and what it should choose, from the definition."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd import ErrorFeedbackSGD, PowerSGDOptimizer, TensorCompressor, TopK
from efsgd.layout import matrix_shape
from efsgd.randomness import Draws
from efsgd.rank import LGreCo, RankPolicy, Value
from efsgd.testing import Traced
from tests.rank.rank_runs import Team
from tests.simulation import errors_of
from tests.strategies import gaussian

Shape = tuple[int, ...]

SHAPES: list[Shape] = [(16, 12), (9,), (12, 20), (10, 4, 3)]
OPTIONS: dict[str, Any] = {"lr": 0.01, "min_compression_rate": 0.0, "rank": 2}
DENSITIES: dict[str, Any] = {"values": [0.05, 0.1, 0.2], "setting": "density"}


def decaying(shape: Shape, decay: float, *seed: int) -> Tensor:
    """A gradient whose singular values fall by about this factor, down to a hundredth."""
    n, m = matrix_shape(shape)
    values = torch.logspace(0, min(n, m) - 1, min(n, m), decay, dtype=torch.float64, device="cpu")
    left, right = (gaussian((size, min(n, m)), *seed, i) for i, size in enumerate((n, m)))
    noise = 0.01 * gaussian((n, m), *seed, 3)
    return (left @ torch.diag(values) @ right.mT + noise).reshape(shape)


class Workers(Team):
    """Some workers with L-GreCo, all of whose parameters are in one group.

    Each parameter's gradients are the same matrix all the time, and a smaller one that is new in
    each step and on each worker. `seen[step][w][i]` is Δ_w = g_w + e_w of each step.
    """

    def __init__(
        self,
        policies: Callable[[], RankPolicy],
        world_size: int,
        shapes: Sequence[Shape],
        make: Callable[..., Any] = PowerSGDOptimizer,
        *,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(policies, world_size, shapes, make, **{"lr": 0.01, **options})
        self.shapes, self._seed, self.count = shapes, seed, 0
        self.seen: list[list[list[Tensor]]] = []

    def groups(self, parameters: list[Tensor]) -> list[Any]:
        return parameters

    @property
    def sums(self) -> list[dict[int, Tensor]]:
        """What L-GreCo has summed up on each worker."""
        return [each.policy.accumulators[0].sums for each in self.schedulers]

    def gradients(self, worker: int) -> list[Tensor]:
        """Of the present step, float64."""
        decays = [0.3 + 0.6 * ((7 * i + self._seed) % 5) / 4 for i in range(len(self.shapes))]
        return [
            (1 + i) * decaying(shape, decays[i], self._seed, i)
            + 0.3 * decaying(shape, decays[i], self._seed, i, worker, self.count)
            for i, shape in enumerate(self.shapes)
        ]

    def step(self, gradients: Sequence[Sequence[Tensor | None]] | None = None) -> list[Traced]:
        """One step; what the workers bring to it is kept in `seen`."""
        count = range(len(self.optimizers))
        own = [self.gradients(w) for w in count] if gradients is None else gradients
        self.count += 1
        errors = [[e.clone() for e in errors_of(optimizer)] for optimizer in self.optimizers]
        self.seen.append(
            [
                [e if g is None else e + g.to(e.dtype) for g, e in zip(*pair, strict=True)]
                for pair in zip(own, errors, strict=True)
            ]
        )
        return super().step(own)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def window(self, count: int) -> list[Traced]:
        """Some steps, and a decision: what the decision sends."""
        self.steps(count)
        return self.decide()

    def sent(self) -> int:
        """The bytes of an ordinary step, counted; the first one after a change is left out."""
        self.step()
        return sum(each.nbytes for each in self.step())

    def summed(self, last: int) -> list[list[Tensor]]:
        """The sum of the last steps in `seen`, as `summed[w][i]`."""
        return [
            [sum(parts, start=torch.zeros(())) for parts in zip(*steps, strict=True)]
            for steps in zip(*self.seen[len(self.seen) - last :], strict=True)
        ]


def greco(
    reference: Any = 2, world_size: int = 2, *, steps: int = 0, start: Any = None, **options: Any
) -> Workers:
    """Workers with PowerSGD and L-GreCo on `SHAPES`, after some steps."""
    made = {**OPTIONS, **(start or {})}
    workers = Workers(lambda: LGreCo(reference, **options), world_size, SHAPES, **made)
    workers.steps(steps)
    return workers


def sparse_greco(
    world_size: int = 2, shapes: Sequence[Shape] = SHAPES, *, start: Any = None, **options: Any
) -> Workers:
    """Workers with Top K and L-GreCo, which chooses densities."""
    made = {"compressor": TopK(density=0.1), "lr": 0.01, **(start or {})}
    policy = {**DENSITIES, **options}
    return Workers(lambda: LGreCo(0.1, **policy), world_size, shapes, ErrorFeedbackSGD, **made)


def mean_of(summed: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(list(own)).mean(0) for own in zip(*summed, strict=True)]


def low_rank_error(matrix: Tensor, rank: Value) -> float:
    """Of the best approximation, from the definition."""
    values = torch.linalg.svdvals(matrix.double().reshape(matrix_shape(matrix.shape))).tolist()
    return math.hypot(*values[int(rank) :])


def missed(own: TensorCompressor, index: int, summed: Sequence[Sequence[Tensor]]) -> float:
    """What a compressor misses of a parameter, in the mean over the workers."""
    norms = []
    for worker, tensors in enumerate(summed):
        draws, tensor = Draws(own.seed_of_draws, index, 0, worker), tensors[index]
        if own.compresses(tensor.shape):
            found = own.decompress(own.compress(tensor, draws), tensor.shape, draws)
            norms.append(float((tensor - found).norm()))
    return math.fsum(norms) / len(summed)


def payload_bytes(compressor: Any, shape: Shape, setting: str, value: Value) -> int:
    """What one parameter sends with a value."""
    own = dataclasses.replace(compressor, **{setting: value})
    return int(own.payload_bytes([shape], torch.float64, 1))


def assert_least(
    values: Sequence[Value],
    sizes: Sequence[Mapping[Any, float]],
    errors: Sequence[Mapping[Any, float]],
    reference: Sequence[Value],
    tolerance: float = 1.0,
) -> None:
    """Of all choices within the error of the reference none has a smaller total size."""
    budget = tolerance * _total(errors, reference)
    choices = itertools.product(*sizes)
    within = [chosen for chosen in choices if _total(errors, chosen) <= budget]
    assert _total(sizes, values) == min(_total(sizes, chosen) for chosen in within)


def _total(numbers: Sequence[Mapping[Any, float]], chosen: Sequence[Value]) -> float:
    return math.fsum(own[value] for own, value in zip(numbers, chosen, strict=True))


def purposes(trace: Sequence[Traced]) -> list[str]:
    """Of a decision: what L-GreCo itself has sent."""
    return [each.purpose for each in trace if "accumulated gradients" in each.purpose]
