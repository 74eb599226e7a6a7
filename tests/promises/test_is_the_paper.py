"""Promise 1: `step()` is Algorithms 1 and 2, as the naive reference has them."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd import PowerSGDOptimizer
from efsgd.algorithms.low_rank.factors import initial_query
from efsgd.testing import step_together
from tests.promises.reference import Reference
from tests.simulation import (
    SEED,
    difference,
    errors_of,
    make_workers,
    parameters_of,
    reference_for,
    step_with,
)
from tests.strategies import FULL_RANK_KINDS, LAYOUTS, Scenario, examples, gaussian, scenarios

# Both sides compute in float64 (2e-16) and differ in the order of sums and in how they
# orthogonalise; a few steps of error feedback multiply that by the matrices' condition.
TOLERANCE = 1e-10

# With matrices of full rank every column of P̂ is determined, so all quantities must agree.
DETERMINED = scenarios(
    kinds=FULL_RANK_KINDS, layouts=[kind for kind in LAYOUTS if kind != "expanded"]
)


def run_beside_reference(
    scenario: Scenario, **implementation: Any
) -> tuple[list[PowerSGDOptimizer], Reference]:
    """Runs both and compares parameters after every step.

    `implementation` is for the optimizer alone: no result should depend on it."""
    options = {**scenario.hyperparameters, **implementation}
    workers = make_workers(scenario.parameters(), scenario.world_size, **options)
    reference = reference_for(scenario)
    for step in range(scenario.steps):
        gradients = scenario.gradients(step)
        step_with(workers, gradients)
        reference.step(gradients)
        for ours, theirs in zip(parameters_of(workers[0]), reference.parameters, strict=True):
            assert difference(ours, theirs) < TOLERANCE
    return workers, reference


@examples(300)
@given(DETERMINED, st.sampled_from([None, 1, 500]))
def test_everything_agrees_with_the_reference(scenario: Scenario, bucket_bytes: int | None) -> None:
    workers, reference = run_beside_reference(scenario, bucket_bytes=bucket_bytes)
    for index, parameter in enumerate(parameters_of(workers[0])):
        state = workers[0].state[parameter]
        if scenario.hyperparameters["momentum"] and "momentum_buffer" in state:
            assert difference(state["momentum_buffer"], reference.momenta[index]) < TOLERANCE
        query = reference.queries[index]
        if scenario.hyperparameters["warm_start"] and query is not None:
            assert difference(state["q"], query) < TOLERANCE
    for worker, optimizer in enumerate(workers):
        for index, error in enumerate(errors_of(optimizer)):
            theirs = reference.errors[worker][index]
            # An error can be all rounding (rank at or above min(n, m)), so relative to Δ_w.
            scale = reference.deltas[worker][index].abs().amax() if theirs.numel() else 0
            assert theirs.numel() == 0 or (error - theirs).abs().max() <= TOLERANCE * (scale + 1)


@examples(150)
@given(scenarios(max_steps=1, with_missing=True))
def test_one_step_agrees_for_every_kind_of_gradient(scenario: Scenario) -> None:
    # Whatever completes a dependent column of P̂ cancels in the first step's mean: Q is zero there.
    run_beside_reference(scenario)


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@examples(100)
@given(
    scenarios(
        kinds=FULL_RANK_KINDS,
        layouts=[kind for kind in LAYOUTS if kind != "expanded"],
        momentum_form="sgd",
    )
)
def test_torch_s_other_implementations_of_sgd_agree_with_the_reference(
    implementation: str, scenario: Scenario
) -> None:
    # In float64, too; that fused multiplies and adds in one rounding is far below TOLERANCE.
    workers, reference = run_beside_reference(scenario, **{implementation: True})
    for index, parameter in enumerate(parameters_of(workers[0])):
        if reference.has_momentum[index]:
            buffer = workers[0].state[parameter]["momentum_buffer"]
            assert difference(buffer, reference.momenta[index]) < TOLERANCE


@pytest.mark.parametrize("shape", [(6, 5), (12, 2, 3), (4, 3, 3, 3), (3, 2, 2, 2, 2)])
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_below_at_and_above(shape: tuple[int, ...], rank: int, world_size: int) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "rank": rank, "min_compression_rate": 0.0}
    shapes = [shape, (7,), shape]
    scenario = Scenario(shapes, world_size, options, 3, 5)
    run_beside_reference(scenario)


def test_several_groups_and_dtypes_in_one_optimizer() -> None:
    shapes, dtypes = [(9, 8), (5,), (8, 9), (9, 8)], [torch.float64, torch.float32] * 2
    own: list[dict[str, Any]] = [
        {"lr": 0.1, "momentum": 0.9, "rank": 2},
        {"lr": 0.3, "momentum": 0.0, "rank": 1, "min_compression_rate": 0.5},
    ]
    start = [gaussian(shape, 3, i) for i, shape in enumerate(shapes)]
    workers = []
    for _ in range(3):
        ps = [p.to(d, copy=True).requires_grad_() for p, d in zip(start, dtypes, strict=True)]
        groups = [{"params": ps[:2], **own[0]}, {"params": ps[2:], **own[1]}]
        workers.append(PowerSGDOptimizer(groups, weight_decay=0.01, seed=SEED))
    scenario = Scenario(shapes, 3, {"rank": 1}, 4, 1)
    settings_of = [{**own[i // 2], "weight_decay": 0.01} for i in range(4)]

    def query(index: int, step: int) -> Tensor:
        return initial_query(SEED, index, shapes[index][-1], settings_of[index]["rank"], step=step)

    reference = Reference(shapes, start, 3, settings_of, query)
    for step in range(4):
        gradients = scenario.gradients(step)
        trace = step_with(workers, gradients)
        reference.step(gradients)
    assert len(trace) == 4  # two for each dtype
    for index, p in enumerate(parameters_of(workers[0])):
        # float32 rounds at 6e-8 and these are a few dozen operations on numbers near 1.
        tolerance = 1e-10 if dtypes[index] == torch.float64 else 1e-5
        assert difference(p, reference.parameters[index]) < tolerance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("world_size", [1, 3])
def test_dtypes(dtype: torch.dtype, world_size: int) -> None:
    shapes = [(16, 12), (4, 3, 3, 3), (10,), ()]
    options = {"lr": 0.05, "rank": 2}
    scenario = Scenario(shapes, world_size, options, 3, 2)
    # Start and gradients are rounded to the dtype first, so that both sides see the same numbers.
    start = [p.to(dtype) for p in scenario.parameters()]
    workers = make_workers(start, world_size, **options)
    reference = reference_for(scenario)
    reference.parameters = [p.double() for p in start]
    for step in range(scenario.steps):
        rounded = [[g.to(dtype) for g in own if g is not None] for own in scenario.gradients(step)]
        step_with(workers, rounded)
        reference.step(rounded)
    # The parameters themselves are rounded at each step; everything before that is float32 or
    # better. So: a few units in the last place of the parameter's dtype.
    tolerance = 1e-10 if dtype == torch.float64 else 10 * torch.finfo(dtype).eps
    for ours, theirs in zip(parameters_of(workers[0]), reference.parameters, strict=True):
        assert ours.dtype == dtype
        assert difference(ours, theirs) < tolerance
    state = workers[0].state[parameters_of(workers[0])[0]]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert state["error"].dtype == state["q"].dtype == wide


def test_tied_parameters_are_exchanged_once() -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20, bias=False))
        model[1].weight = model[0].weight
        return model.double()

    models = [make() for _ in range(2)]
    optimizers = [PowerSGDOptimizer(model.parameters(), lr=0.1, rank=2) for model in models]
    for worker, model in enumerate(models):
        model(torch.arange(5) + worker).square().sum().backward()
    expected = torch.stack([model[0].weight.grad for model in models]).mean(0)
    trace = step_together(optimizers)
    assert [t.shape[0] for t in trace[-2:]] == [1 + 2 + 20 * 2, 8 * 2]  # words, P; Q
    # Nothing else is lost or counted twice: what was not applied is in the errors.
    applied = (make()[0].weight - models[0][0].weight) / (2 * 0.1)
    kept = torch.stack([errors_of(optimizer)[0] for optimizer in optimizers]).mean(0)
    assert difference(applied + kept, expected) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_formats_of_gradients_and_parameters(layout: str) -> None:
    shapes = [(8, 6, 3, 3), (12, 10)]
    options = {"lr": 0.1, "momentum": 0.9, "rank": 2}
    scenario = Scenario(shapes, 2, options, 3, 4, layouts=[layout] * 2)
    plain = make_workers(scenario.parameters(), 2, **options)
    start = [p.to(memory_format=torch.channels_last) if p.ndim == 4 else p.T.contiguous().T
             for p in scenario.parameters()]  # fmt: skip
    strided = make_workers(start, 2, **options)
    strides = [p.stride() for p in parameters_of(strided[0])]
    addresses = [p.data_ptr() for p in parameters_of(strided[0])]
    for step in range(3):
        gradients = scenario.gradients(step)
        contiguous = [[g.contiguous() for g in own if g is not None] for own in gradients]
        step_with(plain, contiguous)
        step_with(strided, gradients)
    for ours, expected in zip(parameters_of(strided[0]), parameters_of(plain[0]), strict=True):
        assert torch.equal(ours, expected)
    assert [p.stride() for p in parameters_of(strided[0])] == strides
    assert [p.data_ptr() for p in parameters_of(strided[0])] == addresses
