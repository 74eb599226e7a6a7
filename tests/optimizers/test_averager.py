"""GradientAverager: the same exchange as the optimizer's, with Δ' written to the gradients."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd import ErrorFeedbackSGD, GradientAverager, NonFiniteGradientError, PowerSGD
from efsgd.checkpoint import consolidation
from efsgd.testing import lockstep, step_together
from tests.simulation import bits, parameters_of, set_gradients, step_with
from tests.strategies import Scenario, examples, gaussian, scenarios

SHAPES = [(12, 10), (10,), (6, 4, 3, 3), (), (9, 9)]


def parameters(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [gaussian(shape, seed).to(dtype) for seed, shape in enumerate(SHAPES)]


def gradients(step: int, worker: int) -> list[Tensor | None]:
    made: list[Tensor | None]
    made = [gaussian(shape, 97 * step + 11 * worker + i + 5) for i, shape in enumerate(SHAPES)]
    if (step + worker) % 3 == 0:
        made[step % len(SHAPES)] = None
    return made


def averagers(world_size: int, **options: Any) -> list[GradientAverager]:
    compressor = PowerSGD(rank=2, seed=3)
    return [
        GradientAverager([p.requires_grad_() for p in parameters()], compressor, **options)
        for _ in range(world_size)
    ]


def step(workers: list[GradientAverager], number: int) -> None:
    set_gradients(workers, [gradients(number, worker) for worker in range(len(workers))])
    step_together(workers)


@examples(50)
@given(scenarios(), st.booleans())
def test_it_is_the_optimizer_in_every_scenario(scenario: Scenario, alternating: bool) -> None:
    options = scenario.hyperparameters
    names = ("rank", "min_compression_rate", "warm_start")
    own = {name: options[name] for name in names}
    compressor = PowerSGD(seed=3, alternating=alternating, **own)
    kept = {name: options[name] for name in ("error_feedback", "start_compressing_at")}
    rule = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    models, twins = (
        [[p.requires_grad_() for p in scenario.parameters()] for _ in range(scenario.world_size)]
        for _ in range(2)
    )
    workers = [GradientAverager(model, compressor, **kept) for model in models]
    sgds = [torch.optim.SGD(model, **rule) for model in models]
    ours = [
        ErrorFeedbackSGD(twin, compressor=compressor, momentum_form="sgd", **rule, **kept)
        for twin in twins
    ]
    for number in range(scenario.steps):
        step_with(workers, scenario.gradients(number))
        for sgd in sgds:
            sgd.step()
        step_with(ours, scenario.gradients(number))
        for model, twin in zip(models, twins, strict=True):
            assert bits(model) == bits(twin) == bits(models[0])
        for worker, optimizer in zip(workers, ours, strict=True):
            for mine, other in zip(*map(parameters_of, (worker, optimizer)), strict=True):
                expected = optimizer.state[other]
                for key in ("error", "p", "q"):
                    assert bits(worker.state[mine].get(key)) == bits(expected.get(key))


@pytest.mark.parametrize("name", ["AdamW", "Muon", "RMSprop"])
def test_any_optimizer_keeps_workers_equal(name: str) -> None:
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    kind = getattr(torch.optim, name)
    shapes = [(12, 10), (9, 9)]  # Muon takes matrices only
    models = [[gaussian(s, i).requires_grad_() for i, s in enumerate(shapes)] for _ in range(3)]
    workers = [GradientAverager(model, PowerSGD(rank=2)) for model in models]
    optimizers = [kind(model, lr=0.01) for model in models]
    before = bits(models[0])
    for number in range(4):
        seeds = [50 * number + 7 * worker for worker in range(3)]
        given = [[gaussian(s, seed + i) for i, s in enumerate(shapes)] for seed in seeds]
        set_gradients(workers, given)
        step_together(workers)
        for optimizer in optimizers:
            optimizer.step()
        assert bits(models[0]) == bits(models[1]) == bits(models[2]) != before


def test_who_has_no_gradient_gets_the_others_and_nobody_s_stays_none() -> None:
    workers = averagers(2)
    set_gradients(workers, [gradients(1, 0), gradients(1, 1)])
    for worker in workers:
        parameters_of(worker)[4].grad = None
    parameters_of(workers[0])[1].grad = None
    step_together(workers)
    assert all(parameters_of(worker)[4].grad is None for worker in workers)
    expected = gradients(1, 1)[1]
    assert expected is not None
    assert torch.equal(parameters_of(workers[0])[1].grad, expected / 2)


def test_expanded_and_sparse_gradients_are_replaced_by_ordinary_ones() -> None:
    table, row = torch.zeros(6, 5, requires_grad=True), torch.zeros(5, 4, requires_grad=True)
    places = torch.tensor([[1, 1, 3]])
    table.grad = torch.sparse_coo_tensor(places, torch.ones(3, 5), (6, 5), check_invariants=True)
    row.grad = torch.ones(4).expand(5, 4)
    assert GradientAverager([table, row]).average_()
    assert table.grad.layout == torch.strided
    assert table.grad.sum(dim=1).tolist() == [0, 10, 0, 5, 0, 0]
    assert row.grad.is_contiguous()
    assert torch.allclose(row.grad, torch.ones(5, 4))  # rank 1, in float32


def test_not_finite_gradients_change_nothing_anywhere() -> None:
    for policy in ("raise", "skip"):
        workers = averagers(2, nonfinite=policy)
        step(workers, 0)
        set_gradients(workers, [gradients(2, 0), gradients(2, 1)])
        parameters_of(workers[1])[0].grad[0, 0] = math.nan
        before = bits([([p.grad for p in parameters_of(w)], w.state_dict()) for w in workers])
        exchanges = [worker.exchange(2, index) for index, worker in enumerate(workers)]
        if policy == "raise":
            with pytest.raises(NonFiniteGradientError, match="worker 1 the gradient of para"):
                lockstep(exchanges)
        else:
            assert lockstep(exchanges).results == [False, False]
        after = bits([([p.grad for p in parameters_of(w)], w.state_dict()) for w in workers])
        assert after == before


@pytest.mark.parametrize("norm", [0.5, 1e6, math.inf])
def test_the_norm_of_all_gradients_together_is_clipped(norm: float) -> None:
    free, clipped = averagers(2), averagers(2, max_grad_norm=norm)
    for workers in (free, clipped):
        step(workers, 1)
    expected = [p.grad for p in parameters_of(free[0])]
    flat = torch.cat([gradient.reshape(-1) for gradient in expected if gradient is not None])
    # P's columns are orthonormal to rounding.
    assert math.isclose(clipped[0].communication_stats()["grad_norm"], flat.norm(), rel_tol=1e-12)
    factor = min(1.0, norm / (float(flat.norm()) + 1e-6))
    for gradient, parameter in zip(expected, parameters_of(clipped[0]), strict=True):
        rounding = 0 if norm == math.inf else 1e-12
        assert torch.allclose(gradient * factor, parameter.grad, rtol=rounding, atol=0)
    errors = [[w.state[p].get("error") for p in parameters_of(w)] for w in (free[1], clipped[1])]
    assert bits(errors[0]) == bits(errors[1])


def reloaded(averager: GradientAverager) -> GradientAverager:
    [twin] = averagers(1)
    twin.load_state_dict(copy.deepcopy(averager.state_dict()))
    return twin


WAYS = [copy.deepcopy, lambda averager: pickle.loads(pickle.dumps(averager)), reloaded]


@pytest.mark.parametrize("way", WAYS, ids=["deepcopy", "pickle", "state_dict"])
def test_it_is_saved_and_goes_on_to_the_bit(
    way: Callable[[GradientAverager], GradientAverager],
) -> None:
    workers = averagers(2)
    for number in range(3):
        step(workers, number)
    twins = [way(worker) for worker in workers]
    ends = []
    for both in (workers, twins):
        step(both, 3)
        ends.append(bits([(w.state_dict(), [p.grad for p in parameters_of(w)]) for w in both]))
    assert ends[0] == ends[1]
    consolidated = lockstep([consolidation(worker) for worker in workers]).results
    assert bits(consolidated[0]) == bits(consolidated[1])


def test_hooks_fire_around_it_and_a_closure_comes_first() -> None:
    parameter = torch.zeros(3, requires_grad=True)
    averager = GradientAverager([parameter])
    seen = []
    averager.register_step_pre_hook(lambda *_: seen.append("before"))
    averager.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> None:
        parameter.grad = torch.ones(3)
        seen.append("closure")

    assert averager.step(closure) is True
    assert averager.average_()
    assert seen == ["before", "closure", "after", "before", "after"]


def test_conjugated_gradients_are_replaced_by_ordinary_ones() -> None:
    workers = []
    for worker in range(2):
        parameter = torch.ones(3, dtype=torch.complex64, requires_grad=True)
        parameter.grad = torch.full((3,), 1 + 2j + worker).conj()  # as autograd may leave it
        assert parameter.grad.is_conj()
        workers.append(GradientAverager([parameter]))
    given = [parameters_of(worker)[0].grad.clone() for worker in workers]
    step_together(workers)
    for worker in workers:
        assert not parameters_of(worker)[0].grad.is_conj()
        assert torch.equal(parameters_of(worker)[0].grad, (given[0] + given[1]) / 2)


def test_groups_of_another_optimizer_are_shared_and_left_as_they_are() -> None:
    own, twins = ([p.requires_grad_() for p in parameters()] for _ in range(2))
    named = [{"params": list(zip("ab", own[:2], strict=True)), "lr": 0.1, "rank": 1}]
    other = torch.optim.AdamW(named, weight_decay=0.3)
    other.add_param_group({"params": list(zip("cde", own[2:], strict=True))})
    before = copy.deepcopy(other.state_dict()), [dict(group) for group in other.param_groups]
    shared = GradientAverager(other.param_groups, PowerSGD(rank=2, seed=3))
    alone = GradientAverager(
        [{"params": twins[:2], "rank": 1}, {"params": twins[2:]}], PowerSGD(rank=2, seed=3)
    )
    for number in range(3):
        step([shared], number)
        step([alone], number)
    assert bits([p.grad for p in own]) == bits([p.grad for p in twins])
    assert before == (other.state_dict(), [dict(group) for group in other.param_groups])
    for group, theirs in zip(shared.param_groups, other.param_groups, strict=True):
        assert group is not theirs
        assert group["param_names"] == theirs["param_names"]
        assert not group.keys() & {"lr", "betas", "weight_decay", "initial_lr"}


def test_groups_of_another_averager_are_new_to_it() -> None:
    first = averagers(1)[0]
    step([first], 0)
    second = GradientAverager(first.param_groups, PowerSGD(rank=2, seed=3))
    assert (first.param_groups[0]["step"], second.param_groups[0]["step"]) == (1, 0)
    with pytest.raises(TypeError, match="param_group must be a dict"):
        first.add_param_group([1])  # type: ignore[arg-type]
