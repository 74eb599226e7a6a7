"""Runs of LQ-SGD with made-up gradients, all workers in one thread."""

from collections.abc import Sequence
from typing import Any

import torch

from efsgd import ErrorFeedbackSGD
from efsgd.algorithms.interfaces import Compressor
from efsgd.testing import Traced
from tests.compressors.made_compressors import make_workers
from tests.simulation import step_with
from tests.strategies import Gradients, Scenario

SHAPES = [(12, 10), (10,), (12, 10), (9, 3, 3, 3)]
AGGREGATIONS = ["gather", "scatter"]


def workers_of(
    compressor: Compressor,
    world_size: int,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> list[ErrorFeedbackSGD]:
    zeros = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    return make_workers(zeros, world_size, compressor, **options)


def gradients(world_size: int, step: int, kind: str = "gaussian") -> Gradients:
    """`gradients[w][i]` of one step."""
    return Scenario(SHAPES, world_size, {}, 9, 5, [kind] * len(SHAPES)).gradients(step)


def train(workers: list[ErrorFeedbackSGD], steps: int, first: int = 0) -> list[Traced]:
    """Some steps; the trace of the last one."""
    trace = []
    for step in range(first, first + steps):
        trace = step_with(workers, gradients(len(workers), step))
    return trace
