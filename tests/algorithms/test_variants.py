"""Variants of PowerSGD: beside a naive version, and where the laws for all do not ask."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from efsgd import LQSGD, NonFiniteGradientError, PowerSGD, PowerSGDPlus
from efsgd.algorithms.alternating import initial_left
from efsgd.algorithms.low_rank.factors import initial_query
from efsgd.testing.gradients import KINDS, gaussian, made_up
from efsgd.testing.strategies import seeds
from tests.algorithms.runs import LR, PLAIN, a_run
from tests.compressors.made_compressors import make_workers
from tests.simulation import bits, difference, errors_of, parameters_of, step_with
from tests.strategies import FULL_RANK_KINDS, Scenario, matrix_dimensions, scenarios

VARIANTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "alternating": (PowerSGD, {"alternating": True}),
    "plus": (PowerSGDPlus, {"refresh_every": 2}),
    "plus, randomized": (PowerSGDPlus, {"refresh_every": 3, "svd": "randomized"}),
    "plus, exact": (PowerSGDPlus, {"refresh_every": 2, "refresh_update": "exact"}),
    "plus, both": (
        PowerSGDPlus,
        {"refresh_every": 3, "svd": "randomized", "refresh_update": "exact"},
    ),
    "lq": (LQSGD, {}),
    "lq, 2 bits": (LQSGD, {"bits": 2}),
    "lq, 24 bits, scattered": (LQSGD, {"bits": 24, "aggregation": "scatter"}),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def variant(name: str, rank: int = 2, **options: Any) -> Any:
    kind, own = VARIANTS[name]
    return kind(rank=rank, **{**own, **options})


# ---- as naively as it can be written -------------------------------------------------------------


class Naive:
    """One parameter on all workers: float64, one matrix at a time, projectors in place of bases."""

    def __init__(self, scenario: Scenario, index: int, options: dict[str, Any]) -> None:
        hyper, shape = scenario.hyperparameters, scenario.shapes[index]
        n, m = matrix_dimensions(shape)
        r = min(n, m, hyper["rank"])
        self.is_matrix = n * m > hyper["min_compression_rate"] * r * (n + m)
        self.rank, self.form, self.index, self.options = r, (n, m), index, options
        self.start, self.warm = hyper["start_compressing_at"], hyper["warm_start"]
        self.x = scenario.parameters()[index]
        self.errors = [torch.zeros(shape, dtype=torch.float64) for _ in range(scenario.world_size)]
        if self.is_matrix:
            self.draw(0)

    def draw(self, step: int) -> None:
        self.q = initial_query(0, self.index, self.form[1], self.rank, step=step)
        self.p = initial_left(0, self.index, self.form[0], self.rank, step=step)

    def step(self, number: int, gradients: list[Tensor]) -> None:
        deltas = [g + e for g, e in zip(gradients, self.errors, strict=True)]
        mean = torch.stack(deltas).mean(0)
        if not self.is_matrix or number < self.start:
            self.x = self.x - LR * mean
            return
        if not self.warm:
            self.draw(number)
        *local, update = self.sent(number - self.start, [*deltas, mean])
        self.errors = [delta - own for delta, own in zip(deltas, local, strict=True)]
        self.x = self.x - LR * update

    def sent(self, step: int, deltas: list[Tensor]) -> list[Tensor]:
        """What is sent of each, the last of which is the mean."""
        M = [delta.reshape(self.form) for delta in deltas]
        if "alternating" in self.options and step % 2 == 0:
            self.p, basis = M[-1] @ torch.linalg.qr(self.q).Q, self.q
            return [(D @ basis @ torch.linalg.pinv(basis)).reshape(deltas[0].shape) for D in M]
        if "alternating" in self.options:
            basis = torch.linalg.qr(self.p).Q
        elif step % self.options["refresh_every"] == 0:
            basis = torch.linalg.svd(M[-1]).U[:, : self.rank]
        else:
            basis = torch.linalg.qr(M[-1] @ self.q).Q
        self.q = M[-1].mT @ basis
        is_refresh = step % self.options.get("refresh_every", math.inf) == 0
        if is_refresh and self.options["refresh_update"] == "exact":
            return deltas
        return [(basis @ (basis.mT @ D)).reshape(deltas[0].shape) for D in M]


def assert_naive(scenario: Scenario, kind: type[Any], options: dict[str, Any]) -> None:
    hyper = dict(scenario.hyperparameters)
    own = {name: hyper.pop(name) for name in ("rank", "min_compression_rate", "warm_start")}
    compressor = kind(**own, **options)
    workers = make_workers(scenario.parameters(), scenario.world_size, compressor, **hyper)
    naive = [Naive(scenario, index, options) for index in range(len(scenario.shapes))]
    for step in range(scenario.steps):
        gradients = scenario.gradients(step)
        step_with(workers, gradients)
        for index, reference in enumerate(naive):
            reference.step(step, [own[index] for own in gradients])
    for index, reference in enumerate(naive):
        # Float64, times the condition of what is orthogonalized, which pseudo-inverses square, and
        # of the gap below the last singular value that is kept.
        assert difference(parameters_of(workers[0])[index], reference.x) < 1e-8
        for optimizer, error in zip(workers, reference.errors, strict=True):
            scale = 1 + (float(reference.x.abs().max()) if error.numel() else 0.0)
            ours = errors_of(optimizer)[index]
            assert error.numel() == 0 or (ours - error).abs().max() < 1e-8 * scale


WELL_CONDITIONED: dict[str, Any] = {
    "kinds": FULL_RANK_KINDS, "layouts": ["contiguous", "transposed"], "max_steps": 5,
    "with_missing": False, **PLAIN,
}  # fmt: skip


@settings(max_examples=40)
@given(scenarios(**WELL_CONDITIONED))
def test_alternating_steps_are_those_of_a_naive_reference(scenario: Scenario) -> None:
    assert_naive(scenario, PowerSGD, {"alternating": True})


@settings(max_examples=40)
@given(
    scenarios(**WELL_CONDITIONED, warm_start=True),
    st.integers(1, 3), st.sampled_from(["low_rank", "exact"]),
)  # fmt: skip
def test_steps_of_powersgd_plus_are_those_of_a_naive_reference(
    scenario: Scenario, every: int, refresh_update: str
) -> None:
    options = {"refresh_every": every, "refresh_update": refresh_update}
    assert_naive(scenario, PowerSGDPlus, options)


# ---- zeros and scales ----------------------------------------------------------------------------


@every_variant
@settings(max_examples=15)
@given(
    kind=st.sampled_from(KINDS), n=st.integers(1, 12), m=st.integers(1, 12),
    rank=st.integers(1, 6), seed=seeds(), exponent=st.integers(-100, 100),
)  # fmt: skip
def test_a_power_of_two_scales_everything_to_the_bit(
    name: str, kind: str, n: int, m: int, rank: int, seed: int, exponent: int
) -> None:
    if name.startswith("lq"):  # larger numbers are sent in parts
        exponent = max(-60, min(exponent, 60))
    gradients = [made_up(kind, (n, m), w, seed).float() for w in range(2)]
    compressor, results = variant(name, rank, min_compression_rate=0.0), []
    for scale in (1.0, 2.0**exponent):
        workers = make_workers([torch.zeros(n, m)], 2, compressor, lr=0.5)
        for _ in range(4):
            step_with(workers, [[g * scale] for g in gradients])
        results.append(parameters_of(workers[0])[0].detach() / scale)
    assert results[0].isfinite().all()
    # At the small end what should be zero may end in a subnormal number, with fewer digits.
    assert difference(*results) <= (2.0**-40 if exponent < -60 else 0.0)


@pytest.mark.parametrize("name", [name for name in VARIANTS if not name.startswith("lq,")])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("dead", [1, 2, 5])
def test_a_layer_that_was_dead_learns_again(name: str, rank: int, dead: int) -> None:
    # One matrix is dead for a while, its twin in the same batch is not.
    target = gaussian((2, 9, 8), 5).float()
    compressor = variant(name, rank, min_compression_rate=0.0)
    workers = make_workers([torch.zeros(9, 8), torch.zeros(9, 8)], 2, compressor, lr=0.1)
    state = workers[0].state[parameters_of(workers[0])[0]]
    initial = {k: state[k].clone() for k in ("p", "q") if k in state}
    for step in range(dead + 250):
        now = [p.detach() - t for p, t in zip(parameters_of(workers[0]), target, strict=True)]
        if step < dead:
            now[0] = torch.zeros(9, 8)
        step_with(workers, [now, now])
        if step < dead:
            state = workers[0].state[parameters_of(workers[0])[0]]
            assert all(torch.equal(state[key], value) for key, value in initial.items())
            assert not parameters_of(workers[0])[0].any()
    for p, t in zip(parameters_of(workers[0]), target, strict=True):
        # 250 steps on a quadratic that shrinks by 0.9 where it is seen.
        assert (p - t).norm() < 0.05 * t.norm()


# ---- absent and bad gradients, and disagreement --------------------------------------------------


@every_variant
def test_a_parameter_without_gradient_keeps_its_state(name: str) -> None:
    workers, scenario = a_run(variant(name))
    p = parameters_of(workers[0])[0]
    for step in range(6):  # an ordinary step and a refresh, or one of either side
        gradients, before = scenario.gradients(step), bits([p, dict(workers[0].state[p])])
        if step >= 2:
            gradients = [[None, *own[1:]] for own in gradients]
        step_with(workers, gradients)
        assert (bits([p, dict(workers[0].state[p])]) == before) == (step >= 2)


@pytest.mark.parametrize("name", ["alternating", "plus", "plus, randomized"])
def test_an_overflow_is_noticed_by_all(name: str) -> None:
    workers = make_workers([torch.zeros(64, 64)], 2, variant(name, rank=1), lr=0.1)
    state = workers[0].state[parameters_of(workers[0])[0]]["q"]
    huge = 3e38 * state.sign().mT.expand(64, 64).float()
    with pytest.raises(NonFiniteGradientError, match="overflow"):
        step_with(workers, [[huge], [huge]])
    assert not parameters_of(workers[0])[0].any()
