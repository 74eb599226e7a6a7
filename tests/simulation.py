"""Runs a `strategies.Scenario` on real optimizers, all workers in one thread."""

import contextlib
import copy
import io
import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd import ErrorFeedbackSGD, PowerSGDOptimizer
from efsgd.algorithms.low_rank.factors import initial_query
from efsgd.engine.consistency import broadcast_parameters
from efsgd.engine.state import local_state
from efsgd.testing import Traced, lockstep, step_together
from tests.promises.reference import Reference
from tests.strategies import Scenario, matrix_dimensions

SEED = 11


def copied(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Copies that require gradients."""
    return [p.detach().clone().requires_grad_() for p in parameters]


def make_workers(
    parameters: Sequence[Tensor], world_size: int, cuts: Sequence[int] = (), **options: Any
) -> list[PowerSGDOptimizer]:
    """One optimizer per worker, each with its own copy of the parameters; a group ends before each
    of `cuts` that leaves none empty."""
    options = {"seed": SEED, **options}
    bounds = sorted({0, *(cut for cut in cuts if cut < len(parameters)), len(parameters)})
    workers = []
    for _ in range(world_size):
        own = copied(parameters)
        groups = [{"params": own[first:end]} for first, end in itertools.pairwise(bounds)]
        workers.append(PowerSGDOptimizer(groups, **options))
    return workers


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def errors_of(optimizer: ErrorFeedbackSGD) -> list[Tensor]:
    """The error memory of each parameter; zeros where it has none."""
    return [
        optimizer.state[p].get("error", torch.zeros_like(p)).detach()
        for p in parameters_of(optimizer)
    ]


def set_gradients(
    optimizers: Sequence[torch.optim.Optimizer], gradients: Sequence[Sequence[Tensor | None]]
) -> None:
    """Gives each worker its gradients, in the dtype of its parameters."""
    for optimizer, own in zip(optimizers, gradients, strict=True):
        for parameter, gradient in zip(parameters_of(optimizer), own, strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter.dtype)


def step_with(
    optimizers: Sequence[ErrorFeedbackSGD],
    gradients: Sequence[Sequence[Tensor | None]],
    **options: Any,
) -> list[Traced]:
    """Sets the gradients and steps all workers together."""
    set_gradients(optimizers, gradients)
    with warnings.catch_warnings():
        # Made-up gradients may well be equal on all workers, which has a test of its own.
        warnings.filterwarnings("ignore", "All workers have bitwise equal gradients")
        return step_together(optimizers, **options)


def train(
    scenario: Scenario, steps: Iterable[int], *teams: Sequence[torch.optim.Optimizer]
) -> None:
    """Takes these steps of a scenario, with each of the teams of workers."""
    for step in steps:
        for workers in teams:
            step_with(workers, scenario.gradients(step))


@contextlib.contextmanager
def unchanged(optimizers: Sequence[ErrorFeedbackSGD]) -> Iterator[None]:
    """What is done meanwhile must leave all that a step may change bitwise as it is."""
    before = bits(snapshot(optimizers))
    yield
    assert bits(snapshot(optimizers)) == before


def through_a_file(value: Any) -> Any:
    """Saved and loaded, with nothing but plain data allowed in the file."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def broadcast(optimizers: Sequence[ErrorFeedbackSGD], source: int = 0) -> None:
    """`broadcast_parameters` of all workers together, which has no public form without a group."""
    lockstep([broadcast_parameters(o.param_groups, o.method, source) for o in optimizers])


def snapshot(optimizers: Sequence[ErrorFeedbackSGD]) -> list[Any]:
    """All that a step may change: parameters, state and groups of every worker, copied."""
    return copy.deepcopy([(parameters_of(o), o.state_dict()) for o in optimizers])


def replicated(optimizer: ErrorFeedbackSGD) -> Any:
    """What must be equal on all workers, everything but what is local, as `bits`."""
    states = [
        {k: v for k, v in optimizer.state[p].items() if k not in local_state(optimizer.compressor)}
        for p in parameters_of(optimizer)
    ]
    return bits([parameters_of(optimizer), states])


def bits(value: Any) -> Any:
    """A value in which tensors are replaced by their bytes, so that == compares bit by bit."""
    if isinstance(value, Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), raw.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return value


def reference_for(scenario: Scenario) -> Reference:
    """The naive reference, starting from the same parameters and the same Q as the workers."""

    def query(index: int, step: int) -> Tensor:
        n, m = matrix_dimensions(scenario.shapes[index])
        r = min(n, m, scenario.hyperparameters["rank"])
        return initial_query(SEED, index, m, r, step=step)

    parameters = scenario.parameters()
    return Reference(
        scenario.shapes, parameters, scenario.world_size, scenario.hyperparameters, query
    )


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors, relative to the largest element."""
    if a.numel() == 0:
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    scale = max(float(a.abs().max()), float(b.abs().max()), 1e-300)
    return float((a - b).abs().max()) / scale


SHAPES = [(12, 10), (10,), (12, 10)]


def a_run(
    world_size: int = 3,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[list[PowerSGDOptimizer], Scenario]:
    """Workers, usually with two matrices of a batch and a vector; and gradients for some steps."""
    scenario = Scenario([*shapes], world_size, {}, 12, 4)
    own = {"lr": 0.05, "momentum": 0.9, "rank": 2, **options}
    return make_workers([p.to(dtype) for p in scenario.parameters()], world_size, **own), scenario
