"""PowerSGD+: a refresh is the best approximation of the mean, and keeps every promise."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from docs.counter_example import A, descend
from efsgd import (
    CollectiveError,
    ErrorFeedbackSGD,
    NonFiniteGradientError,
    PowerSGD,
    WorkerMismatchError,
)
from efsgd.compressors.powersgd_plus import PowerSGDPlus
from efsgd.powersgd_plus import leading_left_singular_vectors
from efsgd.query import initial_query
from examples.models import CifarResNet18
from tests.simulation import bits, difference, errors_of, parameters_of, replicated, snapshot
from tests.simulation import step_with as step_together_with
from tests.strategies import (
    FULL_RANK_KINDS,
    KINDS,
    Gradients,
    Scenario,
    gaussian,
    generator,
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
VARIANTS = st.fixed_dictionaries(
    {
        "refresh_every": st.integers(1, 3),
        "svd": st.sampled_from(["exact", "randomized"]),
        "refresh_update": st.sampled_from(["low_rank", "exact"]),
    }
)


def make_workers(
    parameters: Sequence[Tensor], world_size: int, compressor: PowerSGD, **options: Any
) -> list[ErrorFeedbackSGD]:
    options = {"lr": LR, "momentum_form": "sgd", **options}
    return [
        ErrorFeedbackSGD(
            [p.detach().clone().requires_grad_() for p in parameters],
            compressor=compressor,
            **options,
        )
        for _ in range(world_size)
    ]


def workers_of(scenario: Scenario, **variant: Any) -> list[ErrorFeedbackSGD]:
    hyper = dict(scenario.hyperparameters)
    own = {name: hyper.pop(name) for name in ("rank", "min_compression_rate", "warm_start")}
    compressor = PowerSGDPlus(**own, **variant)
    return make_workers(scenario.parameters(), scenario.world_size, compressor, **hyper)


# ---- as naively as it can be written ------------------------------------------------------------


class Naive:
    """One parameter on all workers: float64, one matrix at a time, projectors in place of bases."""

    def __init__(self, scenario: Scenario, index: int, variant: dict[str, Any]) -> None:
        hyper, shape = scenario.hyperparameters, scenario.shapes[index]
        n, m = matrix_dimensions(shape)
        r = min(n, m, hyper["rank"])
        self.is_matrix = n * m > hyper["min_compression_rate"] * r * (n + m)
        self.rank, self.form, self.every = r, (n, m), variant["refresh_every"]
        self.is_exact = variant["refresh_update"] == "exact"
        self.start = hyper["start_compressing_at"]
        self.x = scenario.parameters()[index]
        self.errors = [torch.zeros(shape, dtype=torch.float64) for _ in range(scenario.world_size)]
        self.q = initial_query(0, index, m, r) if self.is_matrix else None

    def step(self, number: int, gradients: list[Tensor]) -> None:
        deltas = [g + e for g, e in zip(gradients, self.errors, strict=True)]
        mean = torch.stack(deltas).mean(0)
        if self.q is None or number < self.start:
            self.x = self.x - LR * mean
            return
        matrix = mean.reshape(self.form)
        is_refresh = (number - self.start) % self.every == 0
        if is_refresh:
            basis = torch.linalg.svd(matrix).U[:, : self.rank]
        else:
            basis = torch.linalg.qr(matrix @ self.q).Q
        self.q = matrix.mT @ basis
        send = [basis @ (basis.mT @ d.reshape(self.form)) for d in (*deltas, mean)]
        if is_refresh and self.is_exact:
            send = [*deltas, mean]
        *local, update = (sent.reshape(mean.shape) for sent in send)
        self.errors = [delta - own for delta, own in zip(deltas, local, strict=True)]
        self.x = self.x - LR * update


@settings(max_examples=40)
@given(
    scenarios(kinds=FULL_RANK_KINDS, layouts=["contiguous", "transposed"], max_steps=5,
              with_missing=False, warm_start=True, **PLAIN),
    st.integers(1, 3), st.sampled_from(["low_rank", "exact"]),
)  # fmt: skip
def test_steps_are_those_of_a_naive_reference(
    scenario: Scenario, every: int, refresh_update: str
) -> None:
    variant = {"refresh_every": every, "refresh_update": refresh_update}
    workers = workers_of(scenario, **variant)
    naive = [Naive(scenario, index, variant) for index in range(len(scenario.shapes))]
    for step in range(scenario.steps):
        gradients = scenario.gradients(step)
        step_together_with(workers, gradients)
        for index, reference in enumerate(naive):
            reference.step(step, [own[index] for own in gradients])  # type: ignore[misc]
    for index, reference in enumerate(naive):
        # Float64, times the condition of a few orthogonalizations and of the gap below the last
        # singular value that is kept.
        assert difference(parameters_of(workers[0])[index], reference.x) < 1e-8
        for optimizer, error in zip(workers, reference.errors, strict=True):
            scale = 1 + (float(reference.x.abs().max()) if error.numel() else 0.0)
            ours = errors_of(optimizer)[index]
            assert error.numel() == 0 or (ours - error).abs().max() < 1e-8 * scale


# ---- what a refresh is --------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS), n=st.integers(1, 12), m=st.integers(1, 12),
    rank=st.integers(1, 6), world_size=st.sampled_from([1, 2, 3]), seed=seeds(),
)  # fmt: skip
def test_a_refresh_applies_the_best_approximation_of_the_mean(
    kind: str, n: int, m: int, rank: int, world_size: int, seed: int
) -> None:
    gradients = [make_gradient((n, m), kind, w, seed) for w in range(world_size)]
    compressor = PowerSGDPlus(rank=rank, min_compression_rate=0.0)
    workers = make_workers([torch.zeros(n, m).double()], world_size, compressor)
    step_together_with(workers, [[gradient] for gradient in gradients])
    mean = torch.stack(gradients).mean(0)
    update = -parameters_of(workers[0])[0].detach() / LR
    r, values = min(rank, n, m), torch.linalg.svdvals(mean)
    left, size = float((mean - update).norm()), float(mean.norm())
    # Of both norms: the singular value decomposition is exact to rounding.
    assert abs(left - float(values[r:].norm())) <= 1e-13 * (1 + size)
    assert left**2 <= (1 - r / min(n, m)) * size**2 + 1e-13 * size**2
    for optimizer, gradient in zip(workers, gradients, strict=True):
        assert float(errors_of(optimizer)[0].norm()) <= float(gradient.norm()) * (1 + 1e-13)
    q = workers[0].state[parameters_of(workers[0])[0]]["q"]
    if kind in FULL_RANK_KINDS:
        assert difference(q.norm(dim=0), values[:r]) < 1e-12


def test_an_exact_refresh_applies_the_mean_and_leaves_no_errors() -> None:
    workers = make_workers(
        [torch.zeros(9, 8)], 3, PowerSGDPlus(rank=1, refresh_every=3, refresh_update="exact")
    )
    for step in range(4):
        gradients = [gaussian((9, 8), step, w).float() for w in range(3)]
        owed = torch.stack([errors_of(w)[0] for w in workers]).mean(0)
        before = parameters_of(workers[0])[0].detach().clone()
        trace = step_together_with(workers, [[gradient] for gradient in gradients])
        own = [traced for traced in trace if traced.kind == "AllReduceMean"]
        errors = [errors_of(optimizer)[0] for optimizer in workers]
        if step % 3 == 0:
            assert all(not error.any() for error in errors)
            expected = before - LR * (torch.stack(gradients).mean(0) + owed)
            assert difference(parameters_of(workers[0])[0], expected) < 1e-6  # float32
            assert len(own) == 1
        else:
            assert all(error.any() for error in errors)
            assert len(own) == 2


def test_a_randomized_svd_is_nearly_as_good_as_an_exact_one() -> None:
    left = torch.linalg.qr(gaussian((60, 40), 1)).Q
    right = torch.linalg.qr(gaussian((50, 40), 2)).Q
    values = 0.8 ** torch.arange(40, dtype=torch.float64)
    matrices = ((left * values) @ right.mT)[None].expand(2, -1, -1)
    exact = leading_left_singular_vectors(matrices, 4)
    found = leading_left_singular_vectors(matrices, 4, [generator(0), generator(1)])
    assert not torch.equal(found[0], found[1])
    for own in found:
        assert (own.mT @ own - torch.eye(4)).abs().max() < 1e-14
        distance = (matrices[0] - own @ (own.mT @ matrices[0])).norm()
        # Eight columns more, two iterations: 0.8^(5·8) of what is left out at most.
        assert distance <= 1.001 * values[4:].norm()
    assert difference(exact[0] @ exact[0].mT, left[:, :4] @ left[:, :4].mT) < 1e-13


@pytest.mark.parametrize("randomized", [False, True])
def test_singular_vectors_are_orthonormal_for_every_matrix(randomized: bool) -> None:
    for kind in KINDS:
        for scale in (0.0, 1e-44, 1e-30, 1.0, 1e30):
            matrix = make_gradient((30, 20), kind, 1, 3).float()[None] * scale
            generators = [generator(0)] if randomized else None
            [vectors] = leading_left_singular_vectors(matrix, 3, generators)
            assert (vectors.mT @ vectors - torch.eye(3)).abs().max() < 2e-6  # float32


# ---- the promises -------------------------------------------------------------------------------


@settings(max_examples=40)
@given(scenarios(max_steps=5, **PLAIN), VARIANTS)
def test_nothing_is_lost_and_workers_stay_equal_through_refreshes(
    scenario: Scenario, variant: dict[str, Any]
) -> None:
    workers = workers_of(scenario, **variant)
    start = [p.detach().clone() for p in parameters_of(workers[0])]
    received = [torch.zeros_like(p) for p in start]
    scale = 1.0
    for step in range(scenario.steps):
        gradients: Gradients = scenario.gradients(step)
        step_together_with(workers, gradients)
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


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("refresh_update", ["low_rank", "exact"])
def test_zero_matrices_survive_refreshes_and_learn_again(svd: str, refresh_update: str) -> None:
    compressor = PowerSGDPlus(
        rank=2, refresh_every=3, svd=svd, refresh_update=refresh_update, min_compression_rate=0.0
    )
    target = gaussian((2, 9, 8), 5).float()
    workers = make_workers([torch.zeros(9, 8), torch.zeros(9, 8)], 2, compressor, lr=0.2)
    for step in range(64):
        now = [p.detach() - t for p, t in zip(parameters_of(workers[0]), target, strict=True)]
        if step < 4:
            now[0] = torch.zeros(9, 8)
        step_together_with(workers, [now, now])
        if step < 4:
            assert not parameters_of(workers[0])[0].any()
            assert workers[0].state[parameters_of(workers[0])[0]]["q"].any(dim=0).all()
    for p, t in zip(parameters_of(workers[0]), target, strict=True):
        assert (p - t).norm() < 0.2 * t.norm()  # 60 steps, a quarter of the rank seen in each


@settings(max_examples=25)
@given(st.sampled_from(KINDS), VARIANTS, st.integers(-100, 100), seeds())
def test_a_power_of_two_scales_everything_to_the_bit(
    kind: str, variant: dict[str, Any], exponent: int, seed: int
) -> None:
    gradients = [make_gradient((9, 8), kind, w, seed).float() for w in range(2)]
    compressor = PowerSGDPlus(rank=2, **variant)
    results = []
    for scale in (1.0, 2.0**exponent):
        workers = make_workers([torch.zeros(9, 8)], 2, compressor)
        for _ in range(3):
            step_together_with(workers, [[g * scale] for g in gradients])
        results.append(parameters_of(workers[0])[0].detach() / scale)
    assert results[0].isfinite().all()
    # At the small end what should be zero may end in a subnormal number, with fewer digits.
    assert difference(*results) <= (2.0**-40 if exponent < -60 else 0.0)


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_gradients_are_finite(scale: float, svd: str) -> None:
    workers = make_workers(
        [torch.zeros(9, 8)], 2, PowerSGDPlus(rank=2, refresh_every=2, svd=svd), lr=1e-3
    )
    for step in range(4):
        given = [[scale * gaussian((9, 8), step, w).float()] for w in range(2)]
        step_together_with(workers, given)
    assert parameters_of(workers[0])[0].isfinite().all()
    assert parameters_of(workers[0])[0].any()


SHAPES = [(9, 8), (8,), (9, 8), (4, 3, 3, 3)]


def a_run(world_size: int = 3, **options: Any) -> tuple[list[ErrorFeedbackSGD], Scenario]:
    names = ("refresh_every", "refresh_update", "svd")
    variant = {name: options.pop(name) for name in names if name in options}
    scenario = Scenario(SHAPES, world_size, {}, 9, 2, ["gaussian"] * 4, ["contiguous"] * 4)
    compressor = PowerSGDPlus(rank=2, **{"refresh_every": 2, **variant})
    return make_workers(scenario.parameters(), world_size, compressor, **options), scenario


@pytest.mark.parametrize("refresh_update", ["low_rank", "exact"])
@pytest.mark.parametrize("fail_at", [0, 1])
def test_a_refresh_that_fails_changes_nothing_and_is_taken_again(
    refresh_update: str, fail_at: int
) -> None:
    workers, scenario = a_run(refresh_update=refresh_update)
    twins, _ = a_run(refresh_update=refresh_update)
    for step in range(4):
        for optimizers in (workers, twins):
            step_together_with(optimizers, scenario.gradients(step))
    before = bits(snapshot(workers))
    if refresh_update == "low_rank" or fail_at == 0:
        with pytest.raises(CollectiveError):
            step_together_with(workers, scenario.gradients(4), fail_at=fail_at)
        assert bits(snapshot(workers)) == before
        step_together_with(workers, scenario.gradients(4))
        step_together_with(twins, scenario.gradients(4))
        assert bits(snapshot(workers)) == bits(snapshot(twins))
    else:  # it has one collective only
        step_together_with(workers, scenario.gradients(4), fail_at=fail_at)


@pytest.mark.parametrize("refresh_update", ["low_rank", "exact"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("index", range(4))
def test_a_bad_gradient_at_a_refresh_changes_nothing_anywhere(
    value: float, index: int, refresh_update: str
) -> None:
    workers, scenario = a_run(refresh_update=refresh_update)
    twins, _ = a_run(refresh_update=refresh_update)
    for step in range(2):
        step_together_with(workers, scenario.gradients(step))
        step_together_with(twins, scenario.gradients(step))
    before, gradients = bits(snapshot(workers)), scenario.gradients(2)
    gradients[1][index].view(-1)[-1] = value  # type: ignore[union-attr]
    with pytest.raises(NonFiniteGradientError, match=f"worker 1 the gradient of parameter {index}"):
        step_together_with(workers, gradients)
    assert bits(snapshot(workers)) == before
    for step in (2, 3):
        step_together_with(workers, scenario.gradients(step))
        step_together_with(twins, scenario.gradients(step))
    assert bits(snapshot(workers)) == bits(snapshot(twins))


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_a_mean_that_overflows_at_a_refresh_is_noticed_by_all(svd: str) -> None:
    workers = make_workers([torch.zeros(9, 8)], 2, PowerSGDPlus(rank=1, svd=svd))
    with pytest.raises(NonFiniteGradientError, match="their mean overflows"):
        step_together_with(workers, [[torch.full((9, 8), 3e38)]] * 2)
    assert not parameters_of(workers[0])[0].any()


@pytest.mark.parametrize("steps", [4, 5])
@pytest.mark.parametrize("refresh_update", ["low_rank", "exact"])
def test_what_one_worker_changes_is_an_error_on_all_at_a_refresh_or_not(
    steps: int, refresh_update: str
) -> None:
    options = {"refresh_every": 3, "start_compressing_at": 1, "refresh_update": refresh_update}
    workers, scenario = a_run(**options)
    for step in range(steps):
        step_together_with(workers, scenario.gradients(step))
    workers[1].param_groups[0]["rank"] = 1
    with pytest.raises(WorkerMismatchError, match="worker 1 has changed"):
        step_together_with(workers, scenario.gradients(steps))


def test_a_parameter_without_gradient_keeps_its_state_at_a_refresh() -> None:
    workers, scenario = a_run()
    for step in range(2):
        step_together_with(workers, scenario.gradients(step))
    p = parameters_of(workers[0])[0]
    before = bits([p, dict(workers[0].state[p])])
    step_together_with(workers, [[None, *own[1:]] for own in scenario.gradients(2)])
    assert bits([p, dict(workers[0].state[p])]) == before


@pytest.mark.parametrize("refresh_update", ["low_rank", "exact"])
def test_the_norm_of_an_update_is_told(refresh_update: str) -> None:
    workers, scenario = a_run(refresh_update=refresh_update, max_grad_norm=math.inf)
    for step in range(3):
        before = [p.detach().clone() for p in parameters_of(workers[0])]
        step_together_with(workers, scenario.gradients(step))
        moved = [a - b for a, b in zip(before, parameters_of(workers[0]), strict=True)]
        norm = math.sqrt(sum(float(m.detach().square().sum()) for m in moved)) / LR
        assert workers[0].communication_stats()["grad_norm"] == pytest.approx(norm, rel=1e-12)


# ---- what is sent -------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh_update", ["low_rank", "exact"])
@pytest.mark.parametrize("start", [0, 2])
def test_refreshes_come_on_time_and_bytes_are_those_announced(
    refresh_update: str, start: int
) -> None:
    options = {"refresh_every": 3, "refresh_update": refresh_update}
    workers, scenario = a_run(start_compressing_at=start, **options)
    compressor = PowerSGDPlus(rank=2, **options)
    everything = sum(math.prod(shape) for shape in SHAPES)
    words = 8 * (len(SHAPES) + len(workers))
    sent = []
    for step in range(9):
        step_together_with(workers, scenario.gradients(step))
        stats = workers[0].communication_stats()
        sent.append(stats["bytes_sent"] - words)
        if step < start:
            assert sent[-1] == 8 * everything
        else:
            announced = compressor.payload_bytes(SHAPES, torch.float64, step - start)
            assert sent[-1] == announced
    # Of the three matrices, r (n + m) or all, and r m for two of size 8 and one of 27.
    ordinary = 8 * (8 + 2 * (17 + 17 + 31))
    refresh = 8 * (everything + (2 * (8 + 8 + 27) if refresh_update == "low_rank" else 0))
    assert sent[start : start + 4] == [refresh, ordinary, ordinary, refresh]


@pytest.mark.parametrize(
    ("rank", "every", "floats", "ratio"),
    [
        (1, 50, 269_126, 41.5), (1, 100, 157_530, 70.9), (1, 200, 101_733, 109.8),
        (1, 500, 68_254, 163.7), (1, 1000, 57_094, 195.7),
        (2, 50, 305_355, 36.6), (2, 200, 138_034, 81.0), (2, 1000, 93_415, 119.6),
        (4, 50, 377_812, 29.6), (4, 200, 210_636, 53.0), (4, 1000, 166_055, 67.3),
    ],
)  # fmt: skip
def test_what_is_sent_of_a_resnet_in_the_mean(
    rank: int, every: int, floats: int, ratio: float
) -> None:
    shapes = [p.shape for p in CifarResNet18().parameters()]
    compressor = PowerSGDPlus(rank=rank, refresh_every=every)
    total = sum(compressor.payload_bytes(shapes, step=step) for step in (0, 1))
    total += (every - 2) * compressor.payload_bytes(shapes, step=every - 1)
    assert abs(total / every / 4 - floats) < 1
    assert round(11_173_962 / (total / every / 4), 1) == ratio


# ---- the counter-example ------------------------------------------------------------------------

RANK_1: dict[str, Any] = {"rank": 1, "min_compression_rate": 0.0}


def test_powersgd_never_sees_what_its_first_q_misses() -> None:
    distances, errors = descend(PowerSGD(**RANK_1))
    assert round(distances[10], 6) == 0.500797
    assert abs(distances[200] - 0.5) < 1e-12
    assert max(abs(e + 0.5 * step) for step, e in enumerate(errors)) < 1e-10


def test_powersgd_plus_converges_from_there() -> None:
    distances, errors = descend(PowerSGDPlus(**RANK_1, refresh_every=20))
    assert round(distances[10], 6) == 0.500797
    assert round(distances[50], 4) == 3.0e-3
    assert distances[200] < 1e-10
    assert max(map(abs, errors[:20])) > 9 and max(map(abs, errors[21:])) < 1


def test_so_it_does_with_a_randomized_svd() -> None:
    # Rounding may show it the second direction even before the second refresh.
    distances, errors = descend(PowerSGDPlus(**RANK_1, refresh_every=20, svd="randomized"))
    assert distances[200] < 1e-10
    assert max(map(abs, errors[21:])) < 1


def test_powersgd_converges_from_a_gaussian_q() -> None:
    for seed in range(3):
        assert descend(PowerSGD(**RANK_1, seed=seed), query=None)[0][200] < 1e-3 * A.norm()


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value", "text"),
    [
        ("refresh_every", 0, r"Invalid refresh_every: 0\. Must be a number of steps, at least 1"),
        ("refresh_every", 2.0, r"Invalid refresh_every: 2\.0"),
        ("refresh_every", True, "Invalid refresh_every: True"),
        ("svd", "fast", r"Invalid svd: 'fast'\. Must be 'exact' or 'randomized'"),
        ("refresh_update", None, "Invalid refresh_update: None. Must be 'low_rank' or 'exact'"),
        ("rank", 0, "Invalid rank: 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting: str, value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PowerSGDPlus(**{setting: value})
    [worker] = make_workers([torch.zeros(9, 8)], 1, PowerSGDPlus())
    worker.param_groups[0][setting] = value
    with pytest.raises(ValueError, match=text):
        step_together_with([worker], [[torch.ones(9, 8)]])


def test_alternating_is_not_for_it() -> None:
    with pytest.raises(TypeError):
        PowerSGDPlus(alternating=True)  # type: ignore[call-arg]
    [worker] = make_workers([torch.zeros(9, 8)], 1, PowerSGDPlus())
    worker.param_groups[0]["alternating"] = True
    with pytest.raises(ValueError, match="Invalid alternating: True"):
        step_together_with([worker], [[torch.ones(9, 8)]])


def test_groups_share_what_decides_the_schedule() -> None:
    for setting, value in {"refresh_every": 7, "svd": "randomized"}.items():
        groups: list[dict[str, Any]] = [{"params": [torch.zeros(9, 8)]} for _ in range(2)]
        groups[1][setting] = value
        with pytest.raises(ValueError, match=f"Invalid {setting}"):
            ErrorFeedbackSGD(groups, compressor=PowerSGDPlus())
