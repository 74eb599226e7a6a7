"""Promise 6: zero, rank-deficient, tiny and huge gradients are finite and scale-equivariant."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efsgd.algorithms.powersgd import orthogonalize
from efsgd.testing.gradients import KINDS, gaussian, made_up
from efsgd.testing.strategies import seeds
from tests.simulation import difference, make_workers, parameters_of, step_with
from tests.strategies import examples

# float32 holds numbers from 1e-38 to 3e38; sums over a few dozen elements need some room.
SCALES = (1e-30, 1e-20, 1e-10, 1e10, 1e20, 1e30)


@examples(200)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 12),
    m=st.integers(1, 12),
    rank=st.integers(1, 6),
    world_size=st.sampled_from([1, 2, 3]),
    seed=seeds(),
    exponent=st.integers(-100, 100),
)
def test_a_power_of_two_scales_everything_to_the_bit(
    kind: str, n: int, m: int, rank: int, world_size: int, seed: int, exponent: int
) -> None:
    gradients = [made_up(kind, (n, m), w, seed).float() for w in range(world_size)]
    results = []
    for scale in (1.0, 2.0**exponent):
        workers = make_workers(
            [torch.zeros(n, m)], world_size, lr=0.5, momentum_form="sgd", rank=rank,
            min_compression_rate=0.0,
        )  # fmt: skip
        for _ in range(3):
            step_with(workers, [[g * scale] for g in gradients])
        results.append(parameters_of(workers[0])[0].detach() / scale)
    assert results[0].isfinite().all()
    # Rounding of what should be zero may end in a subnormal number at the small end, where the
    # scaled run keeps fewer digits: 2^-149 / 2^-100 of a matrix whose elements are near 1.
    assert difference(*results) <= (2.0**-40 if exponent < -60 else 0.0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_sixty_orders_of_magnitude(kind: str, scale: float) -> None:
    gradients = [made_up(kind, (10, 8), w, 4).float() for w in range(2)]
    results = []
    for factor in (1.0, scale):
        workers = make_workers([torch.zeros(10, 8)], 2, lr=0.5, momentum_form="sgd", rank=2)
        for _ in range(3):
            step_with(workers, [[g * factor] for g in gradients])
        results.append(parameters_of(workers[0])[0].detach().double() / factor)
    # g * factor is rounded in float32, at 6e-8; three steps of error feedback multiply that by
    # the condition of an 8 by 10 matrix.
    assert difference(*results) < 1e-4


@examples(200)
@given(
    kind=st.sampled_from(KINDS),
    n=st.integers(1, 20),
    rank=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    scale=st.sampled_from([0.0, *SCALES, 1.0]),
    seed=seeds(),
)
def test_columns_are_orthonormal_for_every_input(
    kind: str, n: int, rank: int, dtype: torch.dtype, scale: float, seed: int
) -> None:
    rank = min(rank, n)
    matrices = torch.stack([made_up(kind, (n, rank), w, seed) for w in range(3)]) * scale
    matrices = matrices.to(dtype)
    before = matrices.clone()
    p_hat = orthogonalize(matrices)
    gram = p_hat.mT @ p_hat
    # Householder's QR is orthonormal to a few units of rounding, whatever the input.
    assert (gram - torch.eye(rank, dtype=dtype)).abs().max() < 20 * torch.finfo(dtype).eps
    assert torch.equal(matrices, before)
    # Every column of the input lies in their span, up to rounding relative to that column.
    columns = matrices.double()
    rest = columns - p_hat.double() @ (p_hat.double().mT @ columns)
    assert (rest.norm(dim=-2) <= 50 * torch.finfo(dtype).eps * columns.norm(dim=-2)).all()
    # A batch is no more than its matrices, each by itself; but LAPACK may add in another order
    # where a matrix lies elsewhere in memory, and dependent columns may be completed otherwise.
    if kind == "gaussian":
        for index in range(3):
            alone = orthogonalize(matrices[index])
            condition = float(torch.linalg.cond(matrices[index].double())) if scale else 1.0
            assert difference(alone, p_hat[index]) < 50 * torch.finfo(dtype).eps * condition


def test_near_collinear_columns_stay_orthogonal() -> None:
    a = gaussian((50, 1), 1).float()
    p_hat = orthogonalize(torch.cat([a, a + 1e-6 * gaussian((50, 1), 2).float()], dim=1))
    assert (p_hat.mT @ p_hat - torch.eye(2)).abs().max() < 1e-6


def test_more_columns_than_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="Clip the rank"):
        orthogonalize(torch.zeros(2, 3))


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("dead", [1, 5])
def test_a_layer_that_was_dead_learns_again(rank: int, dead: int) -> None:
    # One matrix is dead for a while, its twin in the same batch is not.
    target = gaussian((2, 9, 8), 5).float()
    workers = make_workers([torch.zeros(9, 8), torch.zeros(9, 8)], 2, lr=0.2, rank=rank,
                           momentum_form="sgd")  # fmt: skip
    for step in range(dead + 150):
        now = [p.detach() - t for p, t in zip(parameters_of(workers[0]), target, strict=True)]
        if step < dead:
            now[0] = torch.zeros(9, 8)
        step_with(workers, [now, now])
        assert all(p.isfinite().all() for p in parameters_of(workers[0]))
    for p, t in zip(parameters_of(workers[0]), target, strict=True):
        # 150 steps of gradient descent on a quadratic that shrinks by 0.8 per step where it is
        # seen; error feedback delivers the rest.
        assert (p - t).norm() < 0.05 * t.norm()


def test_a_column_of_zeros_in_q_keeps_what_it_was() -> None:
    workers = make_workers([torch.zeros(9, 8)], 2, lr=0.1, rank=3)
    q_before = workers[0].state[parameters_of(workers[0])[0]]["q"].clone()
    step_with(workers, [[torch.zeros(9, 8)], [torch.zeros(9, 8)]])
    assert torch.equal(workers[0].state[parameters_of(workers[0])[0]]["q"], q_before)
    one_hot = torch.zeros(9, 8)
    one_hot[2, 3] = 1.0
    step_with(workers, [[one_hot], [2 * one_hot]])
    q = workers[0].state[parameters_of(workers[0])[0]]["q"]
    assert q.isfinite().all()
    assert (q.norm(dim=0) > 0).all()
