"""What property tests need beside `efsgd.testing.strategies`: settings, and whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from efsgd.testing.gradients import KINDS, Gradients, gaussian, made_up
from efsgd.testing.strategies import Shape, seeds, shape_lists, world_sizes

FULL_RANK_KINDS = ("gaussian", "scaled")
"""Kinds whose matrices have full rank. For the others a column of P can depend on those before it;
then any orthonormal completion is right, and two right implementations may differ in the local
errors, and from the next step on in everything."""

LAYOUTS = ("contiguous", "transposed", "channels_last", "expanded")


def examples(number: int) -> settings:
    """So many examples for a test, where the profile has 100, and in proportion to that."""
    return settings(max_examples=max(1, number * settings().max_examples // 100))


def matrix_dimensions(shape: Shape) -> tuple[int, int]:
    """(n, m) of the matrix that a tensor is compressed as; (0, 0) where there is none."""
    if len(shape) < 2 or prod(shape) == 0:
        return 0, 0
    return shape[0], prod(shape[1:])


# ---- small choices ------------------------------------------------------------------------------


def ranks(shape_list: Sequence[Shape] = ()) -> st.SearchStrategy[int]:
    """1 to 4, and one below, at and one above the smaller dimension of each matrix given."""
    smaller = [min(matrix_dimensions(shape)) for shape in shape_list]
    near = {size + step for size in smaller if size for step in (-1, 0, 1)}
    return st.sampled_from(sorted({1, 2, 3, 4} | {rank for rank in near if rank > 0}))


def sgd_hyperparameters() -> st.SearchStrategy[dict[str, Any]]:
    """Every combination that torch.optim.SGD accepts, by its own argument names."""
    return st.fixed_dictionaries(
        {
            "lr": st.sampled_from([0.0, 0.01, 0.5]),
            "momentum": st.sampled_from([0.0, 0.5, 0.9]),
            "dampening": st.sampled_from([0.0, 0.3]),
            "weight_decay": st.sampled_from([0.0, 0.1]),
            "nesterov": st.booleans(),
            "maximize": st.booleans(),
        }
    ).filter(lambda h: not h["nesterov"] or (h["momentum"] > 0 and h["dampening"] == 0))


@st.composite
def hyperparameters(draw: st.DrawFn, shape_list: Sequence[Shape] = ()) -> dict[str, Any]:
    """Everything that the optimizer takes, with either form of momentum."""
    drawn = draw(sgd_hyperparameters())
    drawn["momentum_form"] = draw(st.sampled_from(["paper", "sgd"]))
    if drawn["momentum_form"] == "paper":
        drawn |= {"nesterov": False, "dampening": 0.0}
    drawn["rank"] = draw(ranks(shape_list))
    drawn["min_compression_rate"] = draw(st.sampled_from([0.0, 0.5, 1.0]))
    drawn["warm_start"] = draw(st.booleans())
    drawn["error_feedback"] = draw(st.booleans())
    drawn["start_compressing_at"] = draw(st.sampled_from([0, 0, 1, 2]))
    return drawn


# ---- layouts of memory -------------------------------------------------------------------------


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """A copy of `tensor` with the strides that `layout` names, one of LAYOUTS.

    The values stay, except with "expanded", where the first slice of the last dimension represents
    all. A layout that a tensor's number of dimensions does not allow becomes "contiguous"."""
    if layout == "contiguous":
        return tensor.clone(memory_format=torch.contiguous_format)
    if layout == "transposed":
        if tensor.ndim == 0:
            return tensor.clone()
        if tensor.ndim == 1:  # nothing to transpose: every second element of a longer tensor
            return torch.stack([tensor, tensor], dim=1)[:, 0]
        return tensor.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)
    if layout == "channels_last":
        if tensor.ndim != 4:
            return tensor.clone(memory_format=torch.contiguous_format)
        return tensor.clone(memory_format=torch.channels_last)
    if layout == "expanded":
        if tensor.ndim == 0 or tensor.numel() == 0:
            return tensor.clone()
        return tensor[..., :1].clone().expand(tensor.shape)
    raise ValueError(f"unknown layout {layout!r}")


# ---- small helpers ------------------------------------------------------------------------------


def mean_gradient(gradients: Gradients, index: int) -> Tensor | None:
    """The workers' mean, a None being a zero; None where all are."""
    present = [own[index] for own in gradients]
    tensors = [gradient for gradient in present if gradient is not None]
    return torch.stack(tensors).sum(0) / len(gradients) if tensors else None


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest element expected, or absolute where that is below 1."""
    if expected.numel():
        scale = max(1.0, expected.abs().max().item())
        assert (actual - expected).abs().max().item() <= tolerance * scale


# ---- whole runs ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A training run with made-up gradients: all that a reference and an optimizer need alike."""

    shapes: list[Shape]
    world_size: int
    hyperparameters: dict[str, Any]
    steps: int
    seed: int
    kinds: list[str] | None = None  # of each parameter; None: all are gaussian
    layouts: list[str] | None = None  # of each parameter; None: all are contiguous
    missing: frozenset[tuple[int, int, int]] = field(default_factory=frozenset)
    """(step, worker, parameter) of each gradient that is None."""

    def parameters(self) -> list[Tensor]:
        """Initial parameters, new ones at each call."""
        return [gaussian(shape, self.seed, 1, i) for i, shape in enumerate(self.shapes)]

    def gradients(self, step: int) -> Gradients:
        """`gradients[w][i]` of one step."""
        indices = range(len(self.shapes))
        return [[self._gradient(step, w, i) for i in indices] for w in range(self.world_size)]

    def _gradient(self, step: int, worker: int, index: int) -> Tensor | None:
        if (step, worker, index) in self.missing:
            return None
        kind = self.kinds[index] if self.kinds else "gaussian"
        made = made_up(kind, self.shapes[index], worker, self.seed, step, index)
        return with_layout(made, self.layouts[index] if self.layouts else "contiguous")

    def initial_query(self, index: int, step: int) -> Tensor:
        """Q [m, r], standard normal, as `reference.Reference` asks for it."""
        rows, columns = matrix_dimensions(self.shapes[index])
        rank = min(rows, columns, self.hyperparameters["rank"])
        return gaussian((columns, rank), self.seed, 2, index, step)


@st.composite
def scenarios(
    draw: st.DrawFn,
    /,
    kinds: Sequence[str] = KINDS,
    layouts: Sequence[str] = LAYOUTS,
    max_steps: int = 4,
    min_steps: int = 1,
    with_missing: bool = True,
    **fixed: Any,
) -> Scenario:
    """A `Scenario`; `fixed` hyper-parameters replace drawn ones. With `kinds=FULL_RANK_KINDS` and
    `layouts` without "expanded" no column ever depends on others."""
    shape_list = draw(shape_lists())
    world_size, steps = draw(world_sizes()), draw(st.integers(min_steps, max_steps))
    each = len(shape_list)
    missing: frozenset[tuple[int, int, int]] = frozenset()
    if with_missing:
        step, worker = st.integers(0, steps - 1), st.integers(0, world_size - 1)
        index = st.integers(0, each - 1)
        missing = draw(st.frozensets(st.tuples(step, worker, index), max_size=6))
        for t, i in draw(st.frozensets(st.tuples(step, index), max_size=2)):  # of no worker
            missing |= {(t, w, i) for w in range(world_size)}
    return Scenario(
        shapes=shape_list,
        world_size=world_size,
        hyperparameters=draw(hyperparameters(shape_list)) | fixed,
        steps=steps,
        seed=draw(seeds()),
        kinds=draw(st.lists(st.sampled_from(kinds), min_size=each, max_size=each)),
        layouts=draw(st.lists(st.sampled_from(layouts), min_size=each, max_size=each)),
        missing=missing,
    )
