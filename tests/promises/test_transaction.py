"""Promise 5: a step happens wholly or not at all, on every worker."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efsgd import CollectiveError, NonFiniteGradientError, PowerSGDOptimizer, Signum
from tests.simulation import (
    bits,
    make_workers,
    parameters_of,
    snapshot,
    step_with,
    train,
    unchanged,
)
from tests.strategies import Scenario, examples

SHAPES = [(9, 8), (8,), (9, 8), (4, 3, 3, 3)]
DTYPES = [torch.float64, torch.float64, torch.float32, torch.float64]


def a_run(
    world_size: int = 3, kind: type = PowerSGDOptimizer, **options: Any
) -> tuple[list[Any], Scenario]:
    """Workers whose parameters are of two dtypes, and so in two buckets."""
    scenario = Scenario(SHAPES, world_size, {}, 4, 2)
    start = [p.to(dtype) for p, dtype in zip(scenario.parameters(), DTYPES, strict=True)]
    if kind is Signum:
        own = [[p.clone().requires_grad_() for p in start] for _ in range(world_size)]
        return [Signum(parameters, lr=0.01, **options) for parameters in own], scenario
    own_options = {"lr": 0.1, "momentum": 0.9, "rank": 2, **options}
    return make_workers(start, world_size, **own_options), scenario


@examples(40)
@given(
    fail_at=st.integers(0, 3),
    good_steps=st.integers(1, 3),
    world_size=st.sampled_from([1, 2, 4]),
    warm_start=st.booleans(),
    start=st.sampled_from([0, 2]),
    bucket_bytes=st.sampled_from([None, 1]),
)
def test_a_failed_collective_changes_nothing(
    fail_at: int,
    good_steps: int,
    world_size: int,
    warm_start: bool,
    start: int,
    bucket_bytes: int | None,
) -> None:
    options = {
        "warm_start": warm_start,
        "start_compressing_at": start,
        "bucket_bytes": bucket_bytes,
    }
    (workers, scenario), (twins, _) = (a_run(world_size, **options) for _ in range(2))
    train(scenario, range(good_steps), workers, twins)
    # Two buckets of two collectives each, or of one each while nothing is compressed. Where the
    # layout changes, collectives that compare the workers come first: any of them may fail, too.
    before = snapshot(workers)
    try:
        step_with(workers, scenario.gradients(3), fail_at=fail_at)
        failed = False
    except CollectiveError:
        failed = True
    assert failed == (bits(snapshot(workers)) == bits(before))
    if start == 0:
        assert failed
    if failed:
        step_with(workers, scenario.gradients(3))
    step_with(twins, scenario.gradients(3))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


def test_the_first_step_may_fail_as_well() -> None:
    for fail_at in range(6):  # two that compare workers, four of the step
        workers, scenario = a_run()
        with unchanged(workers), pytest.raises(CollectiveError):
            step_with(workers, scenario.gradients(0), fail_at=fail_at)
        twins, _ = a_run()
        step_with(workers, scenario.gradients(0))
        step_with(twins, scenario.gradients(0))
        assert bits(snapshot(workers)) == bits(snapshot(twins))


@examples(80)
@given(
    kind=st.sampled_from([PowerSGDOptimizer, PowerSGDOptimizer, Signum]),
    worker=st.integers(0, 2),
    index=st.integers(0, 3),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    policy=st.sampled_from(["raise", "skip"]),
    momentum_form=st.sampled_from(["paper", "sgd"]),
)
def test_a_non_finite_gradient_on_one_worker_changes_nothing_anywhere(
    kind: type, worker: int, index: int, value: float, policy: str, momentum_form: str
) -> None:
    options = {"nonfinite": policy} | ({} if kind is Signum else {"momentum_form": momentum_form})
    (workers, scenario), (twins, _) = (a_run(kind=kind, **options) for _ in range(2))
    for optimizers in (workers, twins):
        step_with(optimizers, scenario.gradients(0))
    before = bits(snapshot(workers))
    gradients = scenario.gradients(1)
    bad = gradients[worker][index]
    assert bad is not None
    bad.reshape(-1)[3] = value
    if policy == "skip":
        step_with(workers, gradients)
    else:
        with pytest.raises(NonFiniteGradientError) as caught:
            step_with(workers, gradients)
        # The same words on every worker; lockstep adds what the others raised.
        expected = f"on worker {worker} the gradient of parameter {index} is NaN or infinite"
        assert expected in str(caught.value)
        assert "Step 1 was abandoned" in str(caught.value)
        assert all(str(caught.value) in note for note in caught.value.__notes__)
        assert len(caught.value.__notes__) == 2
    assert bits(snapshot(workers)) == before
    train(scenario, (2, 3), workers, twins)
    assert bits(snapshot(workers)) == bits(snapshot(twins))
    assert workers[0].communication_stats()["skipped_steps"] == (policy == "skip")


def test_names_of_parameters_appear_in_the_error() -> None:
    model = torch.nn.Linear(8, 8)
    optimizer = PowerSGDOptimizer(model.named_parameters(), lr=0.1, rank=1)
    model(torch.full((1, 8), float("inf"))).sum().backward()
    with pytest.raises(NonFiniteGradientError, match=r"parameter 0 \(weight\)"):
        optimizer.step()


def test_a_mean_that_overflows_is_noticed_by_all() -> None:
    workers = make_workers([torch.zeros(4)], 2, lr=0.1)
    with pytest.raises(NonFiniteGradientError, match="their mean overflows"):
        step_with(workers, [[torch.full((4,), 3e38)], [torch.full((4,), 3e38)]])
    assert torch.equal(parameters_of(workers[0])[0], torch.zeros(4))


def test_an_overflow_in_the_error_memory_is_noticed() -> None:
    workers = make_workers([torch.zeros(8, 8)], 2, lr=1e-38, rank=1)
    torch.manual_seed(0)
    huge = [[3e38 * torch.rand(8, 8)] for _ in range(2)]
    with pytest.raises(NonFiniteGradientError, match="overflow"):
        for _ in range(10):
            step_with(workers, copy.deepcopy(huge))
