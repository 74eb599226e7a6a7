"""TopK, RandomK, RandomBlock and Identity inside Algorithm 2, with many workers."""

from typing import Any

import pytest
import torch

from efsgd import ErrorFeedbackSGD, TensorCompressor
from efsgd.compressors.identity import Identity
from efsgd.compressors.top_k import TopK
from tests.compressors.made_compressors import make_workers
from tests.promises.sparse_reference import ALL, SHAPES, NaiveRun
from tests.simulation import copied, errors_of, parameters_of, set_gradients, step_with
from tests.strategies import Scenario, assert_close, gaussian


def a_run(
    compressor: TensorCompressor, world_size: int = 3, **options: Any
) -> tuple[list[ErrorFeedbackSGD], Scenario]:
    scenario = Scenario(SHAPES, world_size, {}, 6, 7)
    options = {"lr": 0.1, "momentum": 0.9, "momentum_form": "paper", **options}
    return make_workers(scenario.parameters(), world_size, compressor, **options), scenario


@pytest.mark.parametrize("compressor", ALL, ids=str)
@pytest.mark.parametrize("world_size", [1, 4])
def test_training_is_algorithm_2_with_the_definition(
    compressor: TensorCompressor, world_size: int
) -> None:
    workers, scenario = a_run(compressor, world_size)
    naive = NaiveRun(compressor, scenario)
    for step in range(scenario.steps):
        gradients = scenario.gradients(step)
        step_with(workers, gradients)
        naive.step(gradients)
        for w, worker in enumerate(workers):
            # Six steps of rounding in float64.
            for x, expected in zip(parameters_of(worker), naive.x, strict=True):
                assert_close(x.detach(), expected, 1e-13)
            for error, expected in zip(errors_of(worker), naive.errors[w], strict=True):
                assert_close(error, expected, 1e-13)


@pytest.mark.parametrize("compressor", ALL, ids=str)
@pytest.mark.parametrize("scale", [-1.0, 2.0**-20, 2.0**40])
def test_what_is_applied_scales_with_the_gradients(
    compressor: TensorCompressor, scale: float
) -> None:
    (one, scenario), (other, _) = a_run(compressor), a_run(compressor)
    for step in range(3):
        step_with(one, scenario.gradients(step))
        step_with(other, [[scale * g for g in own] for own in scenario.gradients(step)])
    for a, b in zip(one, other, strict=True):
        applied = [[w.state[p]["momentum_buffer"] for p in parameters_of(w)] for w in (a, b)]
        kept = [errors_of(w) for w in (a, b)]
        for before, after in (applied, kept):
            for x, y in zip(before, after, strict=True):
                assert torch.equal(x * scale, y)  # a power of two changes no digit


def test_the_scope_of_a_model_is_one_group_s_settings() -> None:
    small = [torch.zeros(40, requires_grad=True), torch.zeros(5, 8, requires_grad=True)]
    large = [torch.zeros(40, requires_grad=True), torch.zeros(5, 8, requires_grad=True)]
    for factor, xs in ((1.0, small), (100.0, large)):
        for i, x in enumerate(xs):
            x.grad = factor * gaussian(tuple(x.shape), 3, i).float()
    compressor = TopK(density=0.1, scope="model")
    groups: list[dict[str, Any]] = [
        {"params": [small[0], large[0]]},
        {"params": [small[1], large[1]], "density": 0.2},
    ]
    ErrorFeedbackSGD(groups, lr=1.0, compressor=compressor).step()
    assert [int(x.count_nonzero()) for x in (*small, *large)] == [0, 0, 8, 16]


def test_identity_is_sgd_and_keeps_no_errors() -> None:
    workers, scenario = a_run(Identity(), momentum_form="sgd", nesterov=True)
    own = copied(scenario.parameters())
    sgd = torch.optim.SGD(own, lr=0.1, momentum=0.9, nesterov=True)
    for step in range(4):
        gradients = scenario.gradients(step)
        step_with(workers, gradients)
        set_gradients([sgd], [[torch.stack(g).mean(0) for g in zip(*gradients, strict=True)]])
        sgd.step()
    for x, expected in zip(parameters_of(workers[0]), own, strict=True):
        assert_close(x.detach(), expected.detach(), 1e-14)  # sums in another order
        assert "error" not in workers[0].state[x]
