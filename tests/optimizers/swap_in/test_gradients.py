"""B7: `p.grad` belongs to the program, and so does the memory of parameters."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.optimizers.swap_in.pairs import (
    FORMS,
    FULL_RANK,
    IMPLEMENTATIONS,
    UNCOMPRESSED,
    give,
    gradients,
    pair,
    start,
)
from tests.simulation import (
    bits,
    difference,
    make_workers,
    parameters_of,
    reference_for,
    replicated,
    step_with,
)
from tests.strategies import LAYOUTS, Scenario, examples, with_layout

WAYS: dict[str, dict[str, Any]] = {
    **FORMS,
    "paper, off": {"min_compression_rate": float("inf")},
    "without feedback": {**FULL_RANK, "error_feedback": False},
    "later": {**FULL_RANK, "start_compressing_at": 1},
}
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decay": {"weight_decay": 0.1},
    "maximize": {"maximize": True},
    "all": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
}


def fingerprint(tensors: list[Tensor]) -> list[Any]:
    """Identity, place, strides and version: whoever writes to a tensor changes the last."""
    return [(id(t), t.data_ptr(), t.stride(), t._version) for t in tensors]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", WAYS)
def test_gradients_are_never_written_to(form: str, implementation: str, layout: str) -> None:
    """B7: with all flags; neither are they replaced, nor the memory of parameters."""
    for flags in FLAGS.values():
        is_sgd_only = "nesterov" in flags or implementation == "fused"
        if form.startswith("paper") and is_sgd_only:
            continue
        own = {"lr": 0.1, **flags, **IMPLEMENTATIONS[implementation]}
        optimizer, _ = pair(start(), WAYS[form], **own)
        parameters = parameters_of(optimizer)
        for step in range(3):
            for p, g in zip(parameters, gradients(parameters, step), strict=True):
                p.grad = with_layout(g, layout)
            given_ = [p.grad for p in parameters]
            before, values = fingerprint(given_), [g.clone() for g in given_]
            places = [(p.data_ptr(), p.stride()) for p in parameters]
            optimizer.step()
            assert all(p.grad is g for p, g in zip(parameters, given_, strict=True))
            assert fingerprint(given_) == before, flags
            assert all(torch.equal(g, v) for g, v in zip(given_, values, strict=True)), flags
            assert [(p.data_ptr(), p.stride()) for p in parameters] == places


def test_torch_s_foreach_writes_to_gradients() -> None:
    """B7: beside ours, torch.optim.SGD with foreach and nesterov: it does."""
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}
    ours, theirs = pair(start(shapes=[(4, 3)]), UNCOMPRESSED, **options)
    for optimizer in (ours, theirs):
        give(optimizer, [torch.ones(4, 3)])
        optimizer.step()
    assert torch.equal(parameters_of(ours)[0].grad, torch.ones(4, 3))
    assert torch.equal(parameters_of(theirs)[0].grad, torch.full((4, 3), 1.9))


@pytest.mark.parametrize("form", WAYS)
def test_gradients_that_are_views_of_one_buffer(form: str) -> None:
    """B7: as DistributedDataParallel has them with gradient_as_bucket_view."""
    optimizer, _ = pair(start(), WAYS[form], lr=0.1, momentum=0.9)
    twin, _ = pair(start(), WAYS[form], lr=0.1, momentum=0.9)
    parameters = parameters_of(optimizer)
    bucket = torch.zeros(sum(p.numel() for p in parameters))
    views = bucket.split([p.numel() for p in parameters])
    for p, view in zip(parameters, views, strict=True):
        p.grad = view.view_as(p)
    for step in range(3):
        made = gradients(parameters, step)
        bucket.copy_(torch.cat([g.flatten() for g in made]))
        before = bucket.clone()
        optimizer.step()
        give(twin, made)
        twin.step()
        assert torch.equal(bucket, before)
    assert bits(parameters_of(optimizer)) == bits(parameters_of(twin))


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_gradients_are_not_unscaled_in_place(found_inf: float) -> None:
    """B7, F3: loss scaling leaves them as they are, too, in steps that are taken or skipped."""
    optimizer, _ = pair(start(), FORMS["paper"], lr=0.1)
    parameters = parameters_of(optimizer)
    give(optimizer, gradients(parameters, 0))
    given_ = [p.grad for p in parameters]
    before = fingerprint(given_)
    # What torch.amp.GradScaler leaves on an optimizer whose gradients are not unscaled yet.
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(found_inf)
    optimizer.step()
    assert fingerprint(given_) == before


SHAPES = [(7, 6), (6,), (7, 6)]
WORLD_SIZE, STEPS = 2, 3
EVERY_GRADIENT = [
    (t, w, i) for t in range(STEPS) for w in range(WORLD_SIZE) for i in range(len(SHAPES))
]


@examples(60)
@given(
    missing=st.frozensets(st.sampled_from(EVERY_GRADIENT)),
    form=st.sampled_from(["paper", "sgd"]),
    rate=st.sampled_from([0.0, float("inf")]),
)
def test_patterns_of_missing_gradients(missing: Any, form: str, rate: float) -> None:
    """B2, H2: whoever has none, of any parameter, at any step: as the paper has it, and no drift.

    The reference is the naive float64 implementation; everything here is float64, too.
    """
    hyperparameters = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "rank": 2,
                       "momentum_form": form, "min_compression_rate": rate}  # fmt: skip
    scenario = Scenario(SHAPES, WORLD_SIZE, hyperparameters, STEPS, 7, missing=missing)
    workers = make_workers(scenario.parameters(), WORLD_SIZE, **hyperparameters)
    reference = reference_for(scenario)
    traces = []
    for step in range(STEPS):
        traces.append(step_with(workers, scenario.gradients(step))[-2 if rate == 0.0 else -1 :])
        reference.step(scenario.gradients(step))
        assert replicated(workers[0]) == replicated(workers[1])
        for p, expected in zip(parameters_of(workers[0]), reference.parameters, strict=True):
            assert difference(p, expected) < 1e-10  # sums in another order, in float64
    assert all(trace == traces[0] for trace in traces)
