"""PowerSGD+ is what its paper says: a refresh is the best approximation of the mean."""

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from docs.counter_example import A, descend
from efsgd import ErrorFeedbackSGD, PowerSGD
from efsgd.algorithms.powersgd_plus import leading_left_singular_vectors
from efsgd.compressors.powersgd_plus import PowerSGDPlus
from efsgd.randomness import generator_of
from efsgd.testing.gradients import KINDS, gaussian, made_up
from efsgd.testing.strategies import seeds
from tests.algorithms.runs import SHAPES, a_run
from tests.compressors.made_compressors import make_workers
from tests.simulation import difference, errors_of, parameters_of, step_with
from tests.strategies import FULL_RANK_KINDS

# ---- what a refresh is ---------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS), n=st.integers(1, 12), m=st.integers(1, 12),
    rank=st.integers(1, 6), world_size=st.sampled_from([1, 2, 3]), seed=seeds(),
)  # fmt: skip
def test_a_refresh_applies_the_best_approximation_of_the_mean(
    kind: str, n: int, m: int, rank: int, world_size: int, seed: int
) -> None:
    gradients = [made_up(kind, (n, m), w, seed) for w in range(world_size)]
    compressor = PowerSGDPlus(rank=rank, min_compression_rate=0.0)
    workers = make_workers([torch.zeros(n, m).double()], world_size, compressor)
    step_with(workers, [[gradient] for gradient in gradients])
    mean = torch.stack(gradients).mean(0)
    update = -parameters_of(workers[0])[0].detach()
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
        trace = step_with(workers, [[gradient] for gradient in gradients])
        own = [traced for traced in trace if traced.kind == "AllReduceMean"]
        errors = [errors_of(optimizer)[0] for optimizer in workers]
        if step % 3 == 0:
            assert all(not error.any() for error in errors)
            expected = before - (torch.stack(gradients).mean(0) + owed)
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
    found = leading_left_singular_vectors(matrices, 4, [generator_of(0), generator_of(1)])
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
            matrix = made_up(kind, (30, 20), 1, 3).float()[None] * scale
            generators = [generator_of(0)] if randomized else None
            [vectors] = leading_left_singular_vectors(matrix, 3, generators)
            assert (vectors.mT @ vectors - torch.eye(3)).abs().max() < 2e-6  # float32


# ---- the counter-example -------------------------------------------------------------------------


RANK_1: dict[str, Any] = {"rank": 1, "min_compression_rate": 0.0}


def test_powersgd_never_sees_what_its_first_q_misses() -> None:
    distances, errors = descend(PowerSGD(**RANK_1))
    assert round(distances[10], 6) == 0.500797
    assert abs(distances[200] - 0.5) < 1e-12
    assert max(abs(e + 0.5 * step) for step, e in enumerate(errors)) < 1e-10


@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_powersgd_plus_converges_from_there(svd: str) -> None:
    distances, errors = descend(PowerSGDPlus(**RANK_1, refresh_every=20, svd=svd))
    assert distances[200] < 1e-10
    assert max(map(abs, errors[21:])) < 1
    if svd == "exact":  # rounding may show the other the second direction before the next refresh
        assert round(distances[10], 6) == 0.500797
        assert round(distances[50], 4) == 3.0e-3
        assert max(map(abs, errors[:20])) > 9


def test_powersgd_converges_from_a_gaussian_q() -> None:
    for seed in range(3):
        assert descend(PowerSGD(**RANK_1, seed=seed), query=None)[0][200] < 1e-3 * A.norm()


# ---- what is sent --------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh_update", ["low_rank", "exact"])
@pytest.mark.parametrize("start", [0, 2])
def test_refreshes_come_on_time_and_bytes_are_those_announced(
    refresh_update: str, start: int
) -> None:
    options = {"refresh_every": 3, "refresh_update": refresh_update}
    compressor = PowerSGDPlus(rank=2, **options)
    workers, scenario = a_run(compressor, start_compressing_at=start)
    everything = sum(math.prod(shape) for shape in SHAPES)
    words = 8 * (len(SHAPES) + len(workers))
    sent = []
    for step in range(9):
        step_with(workers, scenario.gradients(step))
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


def test_of_one_decomposition_only_what_is_needed_outlives_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    svd, earlier_ones = torch.linalg.svd, list[weakref.ref[Any]]()

    def watched(matrix: Tensor, **options: Any) -> Any:
        assert all(earlier() is None for earlier in earlier_ones)
        found = svd(matrix, **options)
        earlier_ones.append(weakref.ref(found.U))
        return found

    monkeypatch.setattr(torch.linalg, "svd", watched)
    assert leading_left_singular_vectors(gaussian((3, 6, 5), 1), 2).shape == (3, 6, 2)
    assert len(earlier_ones) == 3


def test_alternating_is_not_for_it() -> None:
    with pytest.raises(TypeError):
        PowerSGDPlus(alternating=True)
    [worker] = make_workers([torch.zeros(9, 8)], 1, PowerSGDPlus())
    worker.param_groups[0]["alternating"] = True
    with pytest.raises(ValueError, match="Invalid alternating: True"):
        step_with([worker], [[torch.ones(9, 8)]])


def test_groups_share_what_decides_the_schedule() -> None:
    for setting, value in {"refresh_every": 7, "svd": "randomized"}.items():
        groups: list[dict[str, Any]] = [{"params": [torch.zeros(9, 8)]} for _ in range(2)]
        groups[1][setting] = value
        with pytest.raises(ValueError, match=f"Invalid {setting}"):
            ErrorFeedbackSGD(groups, compressor=PowerSGDPlus())
