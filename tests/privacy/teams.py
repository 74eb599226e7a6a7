"""Workers in lockstep whose gradients are those of single records, as Opacus leaves them."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from opacus import GradSampleModule
from scipy import stats
from torch import Tensor, nn

from efsgd import (
    ErrorFeedbackSGD,
    GradientAverager,
    Identity,
    PowerSGD,
    PowerSGDOptimizer,
    Signum,
    TopK,
)
from efsgd.privacy import PrivateOptimizer
from efsgd.testing import Traced, lockstep
from efsgd.wire.collectives import Collective, intercept
from tests.simulation import copied, parameters_of
from tests.strategies import gaussian

#: An optimizer, and what exchanges gradients for it where it does not do so itself.
Pair: TypeAlias = tuple[torch.optim.Optimizer, GradientAverager | None]
Make: TypeAlias = Callable[[list[Tensor]], Pair]
#: `records[w][i]`: gradients of the records of worker w for parameter i, [records, *shape].
Records: TypeAlias = list[list[Tensor]]

SHAPES = [(6, 5), (4,), (6, 5), (5, 2, 4)]
#: Probability that a statistical test fails though the code is right.
ERROR_RATE = 1e-9
SETTINGS: dict[str, Any] = {
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "expected_batch_size": 16,
}


def power_sgd(parameters: list[Tensor], **options: Any) -> Pair:
    own = {"lr": 0.1, "momentum": 0.9, "rank": 1, **options}
    return PowerSGDOptimizer(parameters, **own), None


def top_k(parameters: list[Tensor]) -> Pair:
    return ErrorFeedbackSGD(parameters, lr=0.1, compressor=TopK(density=0.2)), None


def signum(parameters: list[Tensor]) -> Pair:
    return Signum(parameters, lr=0.01), None


def adamw(parameters: list[Tensor]) -> Pair:
    averager = GradientAverager(parameters, PowerSGD(rank=1))
    return torch.optim.AdamW(parameters, lr=0.01), averager


def uncompressed(parameters: list[Tensor], **options: Any) -> Pair:
    """Its parameters fall by what is sent, averaged."""
    own = {"lr": 1.0, "momentum_form": "sgd", "compressor": Identity(), **options}
    return ErrorFeedbackSGD(parameters, **own), None


FAMILY: dict[str, Make] = {
    "PowerSGD": power_sgd,
    "top k": top_k,
    "signum": signum,
    "AdamW": adamw,
}


def start_of(shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Values of parameters, the same for everyone."""
    return [gaussian(tuple(shape), 1, i).to(dtype) for i, shape in enumerate(shapes)]


def seeded(*seeds: int) -> list[torch.Generator]:
    """A generator of noise for each worker."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def private_team(
    world_size: int,
    make: Make = uncompressed,
    start: Sequence[Tensor] | None = None,
    generators: Sequence[torch.Generator] | None = None,
    **settings: Any,
) -> list[PrivateOptimizer]:
    """An optimizer for each worker, each with parameters of its own."""
    team = []
    for worker in range(world_size):
        optimizer, averager = make(copied(start_of(SHAPES) if start is None else start))
        generator = None if generators is None else generators[worker]
        given = {**SETTINGS, "averager": averager, "generator": generator, **settings}
        team.append(PrivateOptimizer(optimizer, **given))
    return team


def give(team: Sequence[torch.optim.Optimizer], records: Records) -> None:
    """What a backward pass would leave."""
    for optimizer, own in zip(team, records, strict=True):
        for parameter, gradients in zip(parameters_of(optimizer), own, strict=True):
            parameter.grad, parameter.grad_sample = None, gradients.to(parameter.dtype)


def made_records(
    shapes: Sequence[Sequence[int]], counts: Sequence[int], *seed: int, scale: float = 1.0
) -> Records:
    """Gaussian gradients of so many records of each worker."""
    return [
        [scale * gaussian((n, *shape), *seed, worker, i) for i, shape in enumerate(shapes)]
        for worker, n in enumerate(counts)
    ]


def empty_records(team: Sequence[torch.optim.Optimizer]) -> Records:
    """A batch without a record on each worker."""
    return [[p.detach().new_zeros((0, *p.shape)) for p in parameters_of(o)] for o in team]


def take_step(team: Sequence[Any], **options: Any) -> tuple[list[Traced], list[list[Tensor]]]:
    """One step of all workers: the trace, and the floats that each of them has handed over.

    A member of the team has `exchange`, or is a pair of an optimizer and its averager.
    """
    messages: list[list[Tensor]] = [[] for _ in team]
    exchanges = []
    for worker, member in enumerate(team):

        def note(collective: Collective, own: list[Tensor] = messages[worker]) -> None:
            if collective.buffer.is_floating_point():
                own.append(collective.buffer.clone())

        sender = member if hasattr(member, "exchange") else member[1]
        exchanges.append(intercept(sender.exchange(len(team), worker), note))
    with warnings.catch_warnings():
        # Made-up gradients may well be equal on all workers, which has a test of its own.
        warnings.filterwarnings("ignore", "All workers have bitwise equal gradients")
        trace = lockstep(exchanges, **options).trace
    for member in team:
        if isinstance(member, tuple):
            member[0].step()
    return trace, messages


def step_with(team: Sequence[PrivateOptimizer], records: Records) -> list[list[Tensor]]:
    """One step with these records: what each worker has sent."""
    give(team, records)
    return take_step(team)[1]


def step_watched(
    team: Sequence[PrivateOptimizer], records: Records
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """The same, and the gradients that each worker has made, before they are compressed."""
    noisy: list[list[Tensor]] = [[] for _ in team]
    ends = [
        optimizer.watch(lambda _, o=optimizer, n=own: n.extend(copied(gradients_of(o))))
        for optimizer, own in zip(team, noisy, strict=True)
    ]
    messages = step_with(team, records)
    for end in ends:
        end()
    return messages, [[each.detach() for each in own] for own in noisy]


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Those that the last step has made: what the wrapped optimizer has seen."""
    found = [p.grad for p in parameters_of(optimizer)]
    return [gradient for gradient in found if gradient is not None]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements, float64."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def assert_variance(values: Tensor, expected: float) -> None:
    """Chi-square test of Gaussian values of mean 0: fails by chance in one of 1e9 runs."""
    assert_chi_square(float(values.double().square().sum()) / expected, values.numel())


def assert_chi_square(total: float, freedom: int) -> None:
    """Two-sided test of a sum of squares of so many independent standard normal variables."""
    low = stats.chi2.ppf(ERROR_RATE / 2, freedom)
    high = stats.chi2.isf(ERROR_RATE / 2, freedom)
    assert low < total < high, (low / freedom, total / freedom, high / freedom)


# ---- models whose gradients Opacus computes -----------------------------------------------------


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Small, and the same every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def hooked(**options: Any) -> GradSampleModule:
    """The model, within Opacus's module that computes gradients of records."""
    return GradSampleModule(model(), **options)


def batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and classes of so many records."""
    return gaussian((count, 8), seed, count), torch.arange(count) % 3


def backward(module: nn.Module, inputs: Tensor, classes: Tensor, criterion: Any = None) -> None:
    """The backward pass of a batch, which may be empty."""
    loss = nn.CrossEntropyLoss() if criterion is None else criterion
    with warnings.catch_warnings():
        # torch finds it remarkable that the inputs of a model are no parameters of it.
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        loss(module(inputs), classes).backward()
