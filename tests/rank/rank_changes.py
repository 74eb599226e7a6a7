"""Runs in which every parameter gets another rank before every step, beside the naive reference."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from efsgd import ErrorFeedbackSGD
from efsgd.algorithms.low_rank.factors import initial_query
from tests.promises.reference import Reference
from tests.simulation import SEED, parameters_of
from tests.strategies import gaussian, matrix_dimensions

#: For the parameters of `tests.simulation.a_run`: two matrices, and a vector between them.
OWN: dict[str, Any] = {"rank": (1, None, 3)}

# What new columns have of the length of the shortest learned one, by convention.
UNKNOWN = 2.0**-10


def ranks(optimizer: torch.optim.Optimizer) -> list[int | None]:
    """How many columns the Q of each parameter has; None where there is none."""
    states = (optimizer.state[p] for p in parameters_of(optimizer))
    return [state["q"].shape[1] if "q" in state else None for state in states]


def matrices(count: int) -> list[Tensor]:
    return [gaussian((12, 10), index).requires_grad_() for index in range(count)]


class Changes:
    """Draws settings of single parameters, from some choices for each; None is the group's own."""

    def __init__(self, choices: Mapping[str, Sequence[Any]], seed: int) -> None:
        self._choices, self._random = choices, random.Random(seed)

    def draw(self, count: int) -> dict[str, tuple[Any, ...]]:
        """A value of every setting for each of `count` parameters."""
        return {
            name: tuple(self._random.choice(values) for _ in range(count))
            for name, values in self._choices.items()
        }


def set_own(workers: Sequence[ErrorFeedbackSGD], own: Mapping[str, Sequence[Any]]) -> None:
    """Gives the parameters of every worker, over all groups, settings of their own."""
    for worker in workers:
        first = 0
        for group in worker.param_groups:
            end = first + len(group["params"])
            group["per_parameter"] = {name: tuple(v[first:end]) for name, v in own.items()}
            first = end


def change_reference(
    reference: Reference,
    defaults: Mapping[str, Any],
    own: Mapping[str, Sequence[Any]],
) -> None:
    """Gives the parameters of a reference the same settings, and queries that fit them."""
    for index in range(len(reference.shapes)):
        hyper = reference.hyperparameters[index]
        for name in own.keys() & asdict(hyper).keys():
            value = own[name][index]
            setattr(hyper, name, defaults[name] if value is None else value)
        if not reference.is_compressible(index):
            continue
        n, m = matrix_dimensions(reference.shapes[index])
        fresh = initial_query(SEED, index, m, min(n, m, hyper.rank))
        kept = reference.queries[index]
        if kept is None:
            reference.queries[index] = fresh
        elif kept.shape != fresh.shape:
            reference.queries[index] = naive_resized(kept, fresh)


def naive_resized(kept: Tensor, fresh: Tensor) -> Tensor:
    """Q [m, r] with as many columns as `fresh`, from the definition, column by column.

    Fewer: Q V for the SVD Q = U S V^T, of which the first columns remain; of each column of V the
    largest element is positive. More: columns of `fresh` behind those that are there.
    """
    columns = fresh.shape[1]
    if columns < kept.shape[1]:
        return _rotated(kept)[:, :columns]
    shortest = min(float(column.norm()) for column in kept.T)
    new = [column * _power(UNKNOWN * shortest / float(column.norm())) for column in fresh.T]
    return torch.stack([*kept.T, *new[kept.shape[1] :]], dim=1)


def _power(number: float) -> float:
    """The largest power of two that is not above it."""
    return float(2.0 ** math.floor(math.log2(number)))


def _rotated(kept: Tensor) -> Tensor:
    """Q V, with the columns of V turned so that their largest elements are positive."""
    rotation = torch.linalg.svd(kept, full_matrices=False).Vh
    signs = [1.0 if own[own.abs().argmax()] > 0 else -1.0 for own in rotation]
    turned = [kept @ own * sign for own, sign in zip(rotation, signs, strict=True)]
    return torch.stack(turned, dim=1)
