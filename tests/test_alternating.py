"""PowerSGD in one all-reduce per step: the sides alternate, and every promise is kept."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efsgd import (
    CollectiveError,
    GradientAverager,
    NonFiniteGradientError,
    PowerSGD,
    PowerSGDOptimizer,
    WorkerMismatchError,
)
from efsgd.alternating import initial_left
from efsgd.fusion import has_compiler
from efsgd.query import initial_query
from examples.models import CifarResNet18
from tests.simulation import (
    SEED,
    bits,
    difference,
    errors_of,
    make_workers,
    parameters_of,
    replicated,
    snapshot,
    step_with,
)
from tests.strategies import (
    FULL_RANK_KINDS,
    KINDS,
    Scenario,
    gaussian,
    make_gradient,
    matrix_dimensions,
    scenarios,
    seeds,
)

LR = 0.5
PLAIN: dict[str, Any] = {
    "lr": LR, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False,
    "maximize": False, "momentum_form": "sgd", "error_feedback": True,
}  # fmt: skip
SHAPES = [(9, 8), (8,), (9, 8), (4, 3, 3, 3)]


def workers_of(scenario: Scenario, **options: Any) -> list[PowerSGDOptimizer]:
    options = {**scenario.hyperparameters, **options}
    return make_workers(scenario.parameters(), scenario.world_size, alternating=True, **options)


def a_run(world_size: int = 3, **options: Any) -> tuple[list[PowerSGDOptimizer], Scenario]:
    scenario = Scenario(SHAPES, world_size, {}, 9, 2, ["gaussian"] * 4, ["contiguous"] * 4)
    return workers_of(scenario, **{"lr": 0.1, "rank": 2, **options}), scenario


# ---- as naively as it can be written ------------------------------------------------------------


class Naive:
    """One parameter on all workers: float64, one matrix at a time, projectors in place of bases."""

    def __init__(self, scenario: Scenario, index: int) -> None:
        hyper, shape = scenario.hyperparameters, scenario.shapes[index]
        n, m = matrix_dimensions(shape)
        r = min(n, m, hyper["rank"])
        self.is_matrix = n * m > hyper["min_compression_rate"] * r * (n + m)
        self.rank, self.form, self.index = r, (n, m), index
        self.start, self.warm = hyper["start_compressing_at"], hyper["warm_start"]
        self.x = scenario.parameters()[index]
        self.errors = [torch.zeros(shape, dtype=torch.float64) for _ in range(scenario.world_size)]
        self.q = initial_query(SEED, index, m, r) if self.is_matrix else None
        self.p = initial_left(SEED, index, n, r) if self.is_matrix else None

    def step(self, number: int, gradients: list[Tensor]) -> None:
        deltas = [g + e for g, e in zip(gradients, self.errors, strict=True)]
        mean = torch.stack(deltas).mean(0)
        if self.q is None or self.p is None or number < self.start:
            self.x = self.x - LR * mean
            return
        if not self.warm:
            self.q = initial_query(SEED, self.index, self.form[1], self.rank, step=number)
            self.p = initial_left(SEED, self.index, self.form[0], self.rank, step=number)
        matrix = mean.reshape(self.form)
        if (number - self.start) % 2 == 0:
            projector = self.q @ torch.linalg.pinv(self.q)
            self.p = matrix @ torch.linalg.qr(self.q).Q
            send = [d.reshape(self.form) @ projector for d in (*deltas, mean)]
        else:
            projector = self.p @ torch.linalg.pinv(self.p)
            self.q = matrix.mT @ torch.linalg.qr(self.p).Q
            send = [projector @ d.reshape(self.form) for d in (*deltas, mean)]
        *local, update = (sent.reshape(mean.shape) for sent in send)
        self.errors = [delta - own for delta, own in zip(deltas, local, strict=True)]
        self.x = self.x - LR * update


@settings(max_examples=40)
@given(
    scenarios(kinds=FULL_RANK_KINDS, layouts=["contiguous", "transposed"], max_steps=5,
              with_missing=False, **PLAIN)
)  # fmt: skip
def test_steps_are_those_of_a_naive_reference(scenario: Scenario) -> None:
    workers = workers_of(scenario)
    naive = [Naive(scenario, index) for index in range(len(scenario.shapes))]
    for step in range(scenario.steps):
        gradients = scenario.gradients(step)
        step_with(workers, gradients)
        for index, reference in enumerate(naive):
            reference.step(step, [own[index] for own in gradients])  # type: ignore[misc]
    for index, reference in enumerate(naive):
        # Float64, times the condition of the factors that are orthogonalized; pseudo-inverses
        # square it.
        assert difference(parameters_of(workers[0])[index], reference.x) < 1e-8
        for optimizer, error in zip(workers, reference.errors, strict=True):
            scale = 1 + (float(reference.x.abs().max()) if error.numel() else 0.0)
            ours = errors_of(optimizer)[index]
            assert error.numel() == 0 or (ours - error).abs().max() < 1e-8 * scale


@pytest.mark.parametrize("seed", range(3))
def test_repetition_finds_the_best_approximation(seed: int) -> None:
    left = torch.linalg.qr(gaussian((12, 8), seed, 1)).Q
    right = torch.linalg.qr(gaussian((8, 8), seed, 2)).Q
    values = 2.0 ** -torch.arange(8, dtype=torch.float64)
    matrix = (left * values) @ right.mT
    best = (left[:, :2] * values[:2]) @ right[:, :2].mT
    workers = make_workers(
        [torch.zeros(12, 8).double()], 1, lr=1.0, momentum_form="sgd", rank=2, alternating=True,
        error_feedback=False,
    )  # fmt: skip
    for _ in range(60):  # the subspace converges by a factor of 2 in each
        before = parameters_of(workers[0])[0].detach().clone()
        step_with(workers, [[matrix]])
    update = before - parameters_of(workers[0])[0].detach()
    assert difference(update, best) < 1e-11


# ---- the promises -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(scenarios(max_steps=5, **PLAIN))
def test_nothing_is_lost_and_workers_stay_equal(scenario: Scenario) -> None:
    workers = workers_of(scenario)
    start = [p.detach().clone() for p in parameters_of(workers[0])]
    received = [torch.zeros_like(p) for p in start]
    scale = 1.0
    for step in range(scenario.steps):
        gradients = scenario.gradients(step)
        step_with(workers, gradients)
        for own in gradients:
            for total, gradient in zip(received, own, strict=True):
                if gradient is not None:
                    total += gradient / scenario.world_size
                    scale += float(gradient.abs().sum())
        assert all(replicated(other) == replicated(workers[0]) for other in workers[1:])
        errors = [torch.stack(each).mean(0) for each in zip(*map(errors_of, workers), strict=True)]
        for index, p in enumerate(parameters_of(workers[0])):
            lost = (start[index] - p.detach()) / LR + errors[index] - received[index]
            assert lost.numel() == 0 or lost.abs().max() <= 1e-10 * scale


@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS), n=st.integers(1, 12), m=st.integers(1, 12),
    rank=st.integers(1, 6), seed=seeds(), exponent=st.integers(-100, 100),
)  # fmt: skip
def test_a_power_of_two_scales_everything_to_the_bit(
    kind: str, n: int, m: int, rank: int, seed: int, exponent: int
) -> None:
    gradients = [make_gradient((n, m), kind, w, seed).float() for w in range(2)]
    results = []
    for scale in (1.0, 2.0**exponent):
        workers = make_workers(
            [torch.zeros(n, m)], 2, lr=0.5, momentum_form="sgd", rank=rank, alternating=True,
            min_compression_rate=0.0,
        )  # fmt: skip
        for _ in range(4):
            step_with(workers, [[g * scale] for g in gradients])
        results.append(parameters_of(workers[0])[0].detach() / scale)
    assert results[0].isfinite().all()
    # At the small end what should be zero may end in a subnormal number, with fewer digits.
    assert difference(*results) <= (2.0**-40 if exponent < -60 else 0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_and_huge_gradients_are_finite(kind: str, scale: float) -> None:
    workers = make_workers([torch.zeros(10, 8)], 2, lr=1e-3, rank=2, alternating=True)
    for _ in range(4):
        step_with(workers, [[scale * make_gradient((10, 8), kind, w, 4).float()] for w in range(2)])
    assert parameters_of(workers[0])[0].isfinite().all()
    assert bool(parameters_of(workers[0])[0].any()) == (kind != "zero")


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("dead", [1, 2, 5])
def test_a_layer_that_was_dead_learns_again(rank: int, dead: int) -> None:
    # One matrix is dead for a while, its twin in the same batch is not.
    target = gaussian((2, 9, 8), 5).float()
    workers = make_workers(
        [torch.zeros(9, 8), torch.zeros(9, 8)], 2, lr=0.1, rank=rank, momentum_form="sgd",
        alternating=True, min_compression_rate=0.0,
    )  # fmt: skip
    initial = {k: workers[0].state[parameters_of(workers[0])[0]][k].clone() for k in ("p", "q")}
    for step in range(dead + 250):
        now = [p.detach() - t for p, t in zip(parameters_of(workers[0]), target, strict=True)]
        if step < dead:
            now[0] = torch.zeros(9, 8)
        step_with(workers, [now, now])
        if step < dead:
            state = workers[0].state[parameters_of(workers[0])[0]]
            assert all(torch.equal(state[name], value) for name, value in initial.items())
    for p, t in zip(parameters_of(workers[0]), target, strict=True):
        # 250 steps on a quadratic that shrinks by 0.9 where it is seen.
        assert (p - t).norm() < 0.05 * t.norm()


def test_a_column_of_zeros_keeps_what_it_was_and_zeros_within_a_column_do_not() -> None:
    workers = make_workers([torch.zeros(9, 8)], 2, lr=0.1, rank=2, alternating=True)
    states = [optimizer.state[parameters_of(optimizer)[0]] for optimizer in workers]
    column = torch.tensor([0.0, 1, 2, 3, 4, 0, 0, 0, 0])
    for state in states:
        state["q"] = torch.eye(8, 2)  # of M it takes the first two columns
    kept = states[0]["p"][:, 1].clone()
    step_with(workers, [[torch.outer(column, torch.eye(8)[0])]] * 2)
    assert torch.equal(states[0]["p"], torch.stack([column, kept], dim=1))
    for state in states:
        state["p"] = torch.eye(9, 2)  # and the first two rows
    row, kept = column[:8], states[0]["q"][:, 1].clone()
    step_with(workers, [[torch.outer(torch.eye(9)[0], row)]] * 2)
    assert torch.equal(states[0]["q"], torch.stack([row, kept], dim=1))


def test_a_parameter_without_gradient_keeps_both_factors() -> None:
    workers, scenario = a_run()
    for step in range(4):
        gradients = scenario.gradients(step)
        if step >= 2:  # one step of either side
            gradients = [[None, *own[1:]] for own in gradients]
            before = bits(dict(workers[0].state[parameters_of(workers[0])[0]]))
        step_with(workers, gradients)
        if step >= 2:
            assert bits(dict(workers[0].state[parameters_of(workers[0])[0]])) == before


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_that_fails_changes_nothing_and_keeps_its_side(step: int) -> None:
    workers, scenario = a_run()
    twins, _ = a_run()
    for optimizers in (workers, twins):
        for number in range(step + 1):
            step_with(optimizers, scenario.gradients(number))
    before = bits(snapshot(workers))
    with pytest.raises(CollectiveError):
        step_with(workers, scenario.gradients(5), fail_at=0)
    assert bits(snapshot(workers)) == before
    for number in (5, 6, 7):
        step_with(workers, scenario.gradients(number))
        step_with(twins, scenario.gradients(number))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


@pytest.mark.parametrize("steps", [4, 5])
def test_what_one_worker_changes_is_an_error_on_all_on_either_side(steps: int) -> None:
    workers, scenario = a_run()
    for step in range(steps):
        step_with(workers, scenario.gradients(step))
    workers[1].param_groups[0]["rank"] = 1
    with pytest.raises(WorkerMismatchError, match="worker 1 has changed"):
        step_with(workers, scenario.gradients(steps))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_bad_gradient_shows_even_where_it_is_multiplied_by_zero(side: str, value: float) -> None:
    for rows in range(6):
        workers = make_workers([torch.zeros(6, 7)], 2, lr=0.1, rank=1, alternating=True)
        if side == "left":
            step_with(workers, [[gaussian((6, 7), 1, w).float()] for w in range(2)])
        for optimizer in workers:
            state = optimizer.state[parameters_of(optimizer)[0]]
            for name in ("p", "q"):
                state[name] = torch.zeros_like(state[name])
                state[name][0] = 1.0
        before = bits(snapshot(workers))
        bad = gaussian((6, 7), 2).float()
        bad[rows, rows + 1] = value  # of the columns only the first is multiplied by anything
        with pytest.raises(NonFiniteGradientError, match="worker 1 the gradient of parameter 0"):
            step_with(workers, [[gaussian((6, 7), 3).float()], [bad]])
        assert bits(snapshot(workers)) == before


def test_an_overflow_is_noticed_by_all() -> None:
    workers = make_workers([torch.zeros(64, 64)], 2, lr=0.1, rank=1, alternating=True)
    state = workers[0].state[parameters_of(workers[0])[0]]["q"]
    huge = 3e38 * state.sign().mT.expand(64, 64).float()
    with pytest.raises(NonFiniteGradientError, match="overflow"):
        step_with(workers, [[huge], [huge]])
    assert not parameters_of(workers[0])[0].any()


@pytest.mark.parametrize("step", [0, 1])
def test_the_norm_of_an_update_is_told(step: int) -> None:
    workers, scenario = a_run(max_grad_norm=math.inf, momentum_form="sgd", lr=LR)
    for number in range(step + 1):
        before = [p.detach().clone() for p in parameters_of(workers[0])]
        step_with(workers, scenario.gradients(number))
    moved = [a - b.detach() for a, b in zip(before, parameters_of(workers[0]), strict=True)]
    norm = math.sqrt(sum(float(m.square().sum()) for m in moved)) / LR
    assert workers[0].communication_stats()["grad_norm"] == pytest.approx(norm, rel=1e-12)


# ---- what is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1])
def test_one_all_reduce_carries_all_and_is_as_long_as_announced(start: int) -> None:
    workers, scenario = a_run(start_compressing_at=start)
    compressor = PowerSGD(rank=2, alternating=True)
    words = 8 * (len(SHAPES) + len(workers))
    missing = [[None] * 4] * 3
    for step in range(7):
        trace = step_with(workers, missing if step > 4 else scenario.gradients(step))
        own = [traced for traced in trace if traced.kind == "AllReduceMean"]
        assert len(own) == 1 and len(trace) == (1 if step > start + 1 else len(trace))
        if step >= start:
            announced = compressor.payload_bytes(SHAPES, torch.float64, step - start)
            # Of three matrices r n, or r m; and a vector.
            is_even = (step - start) % 2 == 0
            expected = 8 + 2 * (9 + 9 + 4 if is_even else 8 + 8 + 27)
            assert own[0].nbytes == announced + words == 8 * expected + words


@pytest.mark.parametrize(("rank", "nbytes"), [(1, 111_090), (2, 183_740)])
def test_what_is_sent_of_a_resnet_in_the_mean(rank: int, nbytes: int) -> None:
    shapes = [p.shape for p in CifarResNet18().parameters()]
    compressor = PowerSGD(rank=rank, alternating=True)
    first, second, third = (compressor.payload_bytes(shapes, step=step) for step in range(3))
    assert (first + second) / 2 == nbytes
    assert first == third < second


# ---- settings and state -------------------------------------------------------------------------


def test_the_state_has_both_factors_which_a_new_rank_keeps() -> None:
    workers, scenario = a_run()
    for step in range(3):
        step_with(workers, scenario.gradients(step))
    before = {k: workers[0].state[parameters_of(workers[0])[0]][k].clone() for k in ("p", "q")}
    assert before["p"].shape == (9, 2) and before["q"].shape == (8, 2)
    for optimizer in workers:
        optimizer.param_groups[0]["rank"] = 3
    step_with(workers, scenario.gradients(3))  # from the left: P stays, but for its new column
    p = workers[0].state[parameters_of(workers[0])[0]]["p"]
    assert torch.equal(p[:, :2], before["p"])
    assert torch.equal(p[:, 2], initial_left(SEED, 0, 9, 3)[:, 2])


def test_a_loaded_state_goes_on_to_the_bit_on_either_side() -> None:
    for step in (2, 3):
        workers, scenario = a_run()
        for number in range(step):
            step_with(workers, scenario.gradients(number))
        others = make_workers(parameters_of(workers[0]), 3, lr=1.0, rank=1)
        for old, new in zip(workers, others, strict=True):
            new.load_state_dict(copy.deepcopy(old.state_dict()))
        for number in range(step, step + 2):
            step_with(workers, scenario.gradients(number))
            step_with(others, scenario.gradients(number))
        assert bits(snapshot(others)) == bits(snapshot(workers))


def test_changing_the_form_loses_nothing() -> None:
    workers, scenario = a_run(lr=LR, momentum_form="sgd")
    start = [p.detach().clone() for p in parameters_of(workers[0])]
    received = [torch.zeros_like(p) for p in start]
    for step in range(8):
        for optimizer in workers:
            optimizer.param_groups[0]["alternating"] = step not in (2, 3, 4)
        gradients = scenario.gradients(step)
        step_with(workers, gradients)
        for own in gradients:
            for total, gradient in zip(received, own, strict=True):
                total += gradient / 3
        errors = [torch.stack(each).mean(0) for each in zip(*map(errors_of, workers), strict=True)]
        for index, p in enumerate(parameters_of(workers[0])):
            lost = (start[index] - p.detach()) / LR + errors[index] - received[index]
            assert lost.abs().max() < 1e-10


def test_an_averager_takes_it_as_well() -> None:
    x = torch.zeros(9, 8, requires_grad=True)
    averager = GradientAverager([x], compressor=PowerSGD(rank=2, alternating=True))
    total = torch.zeros(9, 8)
    for step in range(4):
        x.grad = gaussian((9, 8), step).float()
        total += x.grad
        averager.average_()
        total -= x.grad
        assert torch.linalg.matrix_rank(x.grad) == 2
    assert difference(averager.state[x]["error"], total) < 1e-5  # float32


def test_what_is_no_bool_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid alternating: 'yes'\. Must be a bool"):
        PowerSGDOptimizer([torch.zeros(3, requires_grad=True)], alternating="yes")
    groups: list[dict[str, Any]] = [{"params": [torch.zeros(9, 8)]} for _ in range(2)]
    groups[1]["alternating"] = True
    with pytest.raises(ValueError, match="Invalid alternating"):
        PowerSGDOptimizer(groups)


def test_compiled_steps_are_the_same_to_rounding() -> None:
    with warnings.catch_warnings():  # of a missing compiler, or torch's own deprecations
        warnings.simplefilter("ignore")
        if not has_compiler(torch.device("cpu")):
            pytest.skip("torch.compile finds no C++ compiler here")
        ends = []
        for compile in (True, False):
            workers = make_workers(
                [torch.zeros(512, 512, dtype=torch.float64)], 1, lr=0.1, rank=2, compile=compile,
                alternating=True,
            )  # fmt: skip
            for step in range(4):
                step_with(workers, [[gaussian((512, 512), step)]])
            ends.append((parameters_of(workers[0])[0], errors_of(workers[0])[0]))
    for ours, theirs in zip(*ends, strict=True):
        assert difference(ours, theirs) < 1e-12  # sums of two products, in another order
