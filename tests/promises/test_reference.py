"""The reference is what the package is measured by; here it is measured by facts of its own.

Tolerances are for float64, whose operations are exact to 2.2e-16. EXACT_SUMS covers a few hundred
of them on numbers of a size of about one; tests with other needs give theirs with a reason.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd.testing.gradients import gaussian, made_up
from tests import strategies
from tests.optimizers.swap_in.pairs import COMBINATIONS
from tests.promises.reference import Reference, mean, orthogonalize
from tests.strategies import Scenario, assert_close, examples, mean_gradient

EXACT_SUMS = 1e-13
SIZES = st.integers(1, 12)


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def single(shape: tuple[int, ...], world_size: int, query: Tensor, **hyper: Any) -> Reference:
    """A reference for one zero parameter that is compressed whatever its size."""
    zeros = torch.zeros(shape, dtype=torch.float64)
    hyper = {"lr": 1.0, "min_compression_rate": 0.0, **hyper}
    return Reference([shape], [zeros], world_size, hyper, lambda index, step: query)


def of_scenario(run: Scenario) -> Reference:
    hyper = run.hyperparameters
    return Reference(run.shapes, run.parameters(), run.world_size, hyper, run.initial_query)


# ---- orthogonalize, and an example by hand -----------------------------------------------------


@given(SIZES, SIZES, strategies.seeds(), st.sampled_from(strategies.KINDS))
@examples(60)
def test_orthogonalize_gives_orthonormal_columns(n: int, r: int, seed: int, kind: str) -> None:
    p = made_up(kind, (n, min(n, r)), 0, seed)
    p_hat = orthogonalize(p)
    assert_close(p_hat.T @ p_hat, torch.eye(min(n, r), dtype=torch.float64), EXACT_SUMS)
    # Nothing of P lies outside the span, and column j of P is in that of the first j + 1 of P_hat.
    coordinates = p_hat.T @ p
    assert_close(p_hat @ coordinates, p, EXACT_SUMS)
    assert_close(coordinates.tril(-1), torch.zeros_like(coordinates), EXACT_SUMS)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_orthogonalize_at_any_scale_and_of_nearly_dependent_columns(scale: float) -> None:
    p = gaussian((9, 4), 0)
    assert_close(orthogonalize(scale * p), orthogonalize(p), EXACT_SUMS)
    p[:, 1] = p[:, 0] + 1e-10 * p[:, 1]
    p_hat = orthogonalize(scale * p)
    assert_close(p_hat.T @ p_hat, torch.eye(4, dtype=torch.float64), EXACT_SUMS)


def test_orthogonalize_completes_by_the_first_independent_basis_vector() -> None:
    # Column 1 is a multiple of column 0 and column 2 is zero; e_0 is column 0, so e_1 and e_2 come.
    p = matrix([2, 6, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 5])
    assert torch.equal(orthogonalize(p), torch.eye(4, dtype=torch.float64))  # no numerics


def test_by_hand() -> None:
    """Two workers, 2 x 2, rank 1, Q = (1, 0), lambda = 1/2, gamma = 1, x = 0.

    Step 1.  M_1 = [ 7 10]   M_2 = [-1  4]   mean M = [3 7]
                   [ 1  5]         [ 7 -3]            [4 1]
      lines 3-5  P = (mean M) Q = (3, 4), of norm 5;  P_hat = (3, 4) / 5
      lines 6-7  Q_1 = M_1^T P_hat = (21 + 4, 30 + 20) / 5 = (5, 10)
                 Q_2 = M_2^T P_hat = (-3 + 28, 12 - 12) / 5 = (5, 0);  mean Q = (5, 5)
      line 11    Delta' = P_hat Q^T = [3 3]
                                      [4 4]
      line 9     e_1 = M_1 - [3 6] = [ 4  4]    e_2 = M_2 - [3 0] = [-4  4]
                             [4 8]   [-3 -3]                [4 0]   [ 3 -3]
      line 12    m = Delta'
      line 13    x = -2 Delta' = [-6 -6]
                                 [-8 -8]
    Step 2, both gradients zero: Delta_w = e_w, whose mean is [0 4; 0 -3].
      lines 3-5  P = (mean e) (5, 5) = (20, -15), of norm 25;  P_hat = (4, -3) / 5
      lines 6-7  Q_1 = (25, 25) / 5 = (5, 5);  Q_2 = (-5, 5);  mean Q = (0, 5)
      line 11    Delta' = [0  4]
                          [0 -3]
      line 9     e_1 = e_2 = 0
      line 12    m = [3/2 3/2] + [0  4] = [3/2 11/2]
                     [ 2   2 ]   [0 -3]   [ 2   -1 ]
      line 13    x = [-6 -6] - [0  4] - [3/2 11/2] = [-15/2 -31/2]
                     [-8 -8]   [0 -3]   [ 2   -1 ]   [-10    -4  ]
    """
    reference = single((2, 2), 2, matrix([1], [0]), momentum=0.5, rank=1)

    def check(actual: Tensor | None, expected: Tensor) -> None:
        assert actual is not None
        assert_close(actual, expected, EXACT_SUMS)  # not 0: 3/5 and 4/5 are rounded

    reference.step([[matrix([7, 10], [1, 5])], [matrix([-1, 4], [7, -3])]])
    check(reference.last_updates[0], matrix([3, 3], [4, 4]))
    check(reference.queries[0], matrix([5], [5]))
    check(reference.errors[0][0], matrix([4, 4], [-3, -3]))
    check(reference.errors[1][0], matrix([-4, 4], [3, -3]))
    check(reference.momenta[0], matrix([3, 3], [4, 4]))
    check(reference.parameters[0], matrix([-6, -6], [-8, -8]))

    zeros = torch.zeros(2, 2, dtype=torch.float64)
    reference.step([[zeros], [zeros]])
    check(reference.last_updates[0], matrix([0, 4], [0, -3]))
    check(reference.queries[0], matrix([0], [5]))
    check(reference.errors[0][0], zeros)
    check(reference.errors[1][0], zeros)
    check(reference.momenta[0], matrix([1.5, 5.5], [2, -1]))
    check(reference.parameters[0], matrix([-7.5, -15.5], [-10, -4]))


# ---- the laws -----------------------------------------------------------------------------------


@given(strategies.scenarios(error_feedback=True))
@examples(60)
def test_nothing_is_lost(run: Scenario) -> None:
    """Sum of Delta' + mean error = sum of mean gradients, and in each step mean error = mean Delta
    - Delta'. One worker's gradient may be 1e5 times the mean, so the scale is the Deltas'."""
    reference = of_scenario(run)
    given_sum = [torch.zeros(shape, dtype=torch.float64) for shape in run.shapes]
    applied = list(given_sum)
    for step in range(run.steps):
        gradients = run.gradients(step)
        reference.step(gradients)
        for i in range(len(run.shapes)):
            update, deltas = reference.last_updates[i], [own[i] for own in reference.deltas]
            error = mean([own[i] for own in reference.errors])
            applied[i] = applied[i] + update
            tolerance = EXACT_SUMS * max(1.0, *(delta.norm().item() for delta in deltas))
            gradient = mean_gradient(gradients, i)
            if gradient is not None:
                given_sum[i] = given_sum[i] + gradient
                assert_close(error, mean(deltas) - update, tolerance)
            assert_close(applied[i] + error, given_sum[i], tolerance)


@given(
    strategies.scenarios(
        kinds=strategies.FULL_RANK_KINDS, layouts=["contiguous"], with_missing=False
    )
)
@examples(40)
def test_many_workers_are_one_with_the_mean(run: Scenario) -> None:
    many, one = of_scenario(run), of_scenario(replace(run, world_size=1))
    for step in range(run.steps):
        gradients = run.gradients(step)
        many.step(gradients)
        one.step([[mean_gradient(gradients, i) for i in range(len(run.shapes))]])
        for i in range(len(run.shapes)):
            # A rounding error in P, of some 1e-15, grows by the condition number of P, for which
            # 1e5 is generous. Over 1500 examples the greatest difference was 2e-14.
            assert_close(many.parameters[i], one.parameters[i], 1e-10)
            assert_close(many.momenta[i], one.momenta[i], 1e-10)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("true_rank", [1, 2, 3])
def test_low_rank_matrices_are_recovered_exactly(world_size: int, true_rank: int) -> None:
    """A mean of rank at most r comes through whole, whatever the workers' own ranks are; here they
    are full, by noise that cancels in the mean."""
    target = gaussian((8, true_rank), 0) @ gaussian((true_rank, 11), 1)
    noise = [gaussian((8, 11), 2, worker) for worker in range(world_size)]
    gradients = [[target + own - mean(noise)] for own in noise]
    reference = single((8, 11), world_size, gaussian((11, 3), 3), rank=3)
    reference.step(gradients)
    assert_close(reference.last_updates[0], target, EXACT_SUMS)
    assert_close(mean([own[0] for own in reference.errors]), torch.zeros_like(target), EXACT_SUMS)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_repetition_converges_to_the_best_approximation(rank: int) -> None:
    """Without error feedback a fixed matrix makes the warm start a power iteration. Singular values
    1, 1/2, 1/4, ... leave the others behind by 4 in each step: 4^-30 < 1e-18 after 30."""
    left, _ = torch.linalg.qr(gaussian((10, 6), 0))
    right, _ = torch.linalg.qr(gaussian((7, 6), 1))
    fixed = left @ torch.diag(0.5 ** torch.arange(6, dtype=torch.float64)) @ right.T
    u, s, vh = torch.linalg.svd(fixed, full_matrices=False)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
    reference = single((10, 7), 1, gaussian((7, rank), 2), rank=rank, error_feedback=False)
    for _ in range(30):
        reference.step([[fixed]])
    assert_close(reference.last_updates[0], best, EXACT_SUMS)
    assert not reference.errors[0][0].any()


# ---- momentum -----------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_form_sgd_uncompressed_is_torch_sgd(options: dict[str, Any], world_size: int) -> None:
    shapes: list[tuple[int, ...]] = [(), (5,), (4, 3), (20, 30), (0,)]
    start = [gaussian(shape, 0, i) for i, shape in enumerate(shapes)]
    theirs = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    sgd = torch.optim.SGD(theirs, lr=0.1, **options)
    hyper = {"lr": 0.1, "momentum_form": "sgd", "start_compressing_at": 99, **options}
    reference = Reference(shapes, start, world_size, hyper, lambda i, step: torch.zeros(1, 1))
    for step in range(5):
        gradients: strategies.Gradients = [
            [gaussian(shape, 1, step, w, i) for i, shape in enumerate(shapes)]
            for w in range(world_size)
        ]
        for own in gradients:
            own[2] = None if step in (0, 3) else own[2]  # late, and missing once
        gradients[0][1] = None if world_size > 1 else gradients[0][1]  # a zero in the mean
        for i, parameter in enumerate(theirs):
            parameter.grad = mean_gradient(gradients, i)
        sgd.step()
        reference.step(gradients)
        for mine, parameter in zip(reference.parameters, theirs, strict=True):
            assert_close(mine, parameter.detach(), EXACT_SUMS)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_form_paper_on_a_constant_gradient(momentum: float) -> None:
    """m_t = g (1 + l + ... + l^(t-1)); x moves by g + m_t; all in powers of two, so exactly."""
    reference = Reference(
        [(1,)], [matrix([0])], 1, {"lr": 1.0, "momentum": momentum}, lambda i, step: matrix()
    )
    expected = 0.0
    for t in range(1, 6):  # with momentum 0: 2 lr Delta' in each step
        reference.step([[torch.ones(1)]])
        m = sum(momentum**k for k in range(t))
        expected -= 1.0 + m
        assert reference.momenta[0].item() == m
        assert reference.parameters[0].item() == expected


# ---- what the paper leaves open -----------------------------------------------------------------


def test_a_gradient_that_no_worker_has_changes_nothing() -> None:
    reference = single((5, 4), 2, gaussian((4, 1), 0), rank=1, momentum=0.9, weight_decay=0.1)
    reference.step([[gaussian((5, 4), 1)], [None]])  # of one worker: the other's is zero
    assert reference.errors[0][0].any() and not reference.errors[1][0].any()
    kept: list[Any] = [reference.parameters, reference.momenta, reference.queries]
    kept += reference.errors
    before = [each[0] for each in kept]
    reference.step([[None], [None]])
    # The reference replaces tensors and never writes to one, so the same objects are still there.
    assert all(old is each[0] for old, each in zip(before, kept, strict=True))
    assert not reference.last_updates[0].any()


def test_a_dead_layer_keeps_its_queries_and_lives_again() -> None:
    query, alive = gaussian((4, 2), 0), gaussian((5, 1), 1) @ gaussian((1, 4), 2)
    reference = single((5, 4), 1, query, rank=2)
    reference.step([[torch.zeros(5, 4)]])
    assert torch.equal(reference.queries[0], query)
    reference.step([[alive]])
    assert_close(reference.last_updates[0], alive, EXACT_SUMS)


def test_without_warm_start_each_step_draws_its_own_query() -> None:
    queries = [gaussian((6, 1), step) for step in range(3)]
    hyper = {"rank": 1, "warm_start": False, "error_feedback": False}
    reference = Reference([(9, 6)], [torch.zeros(9, 6)], 1, hyper, lambda i, step: queries[step])
    fixed = gaussian((9, 6), 9)
    for query in queries:
        reference.step([[fixed]])
        p_hat = fixed @ query / (fixed @ query).norm()
        assert_close(reference.last_updates[0], p_hat @ (p_hat.T @ fixed), EXACT_SUMS)


def test_when_a_matrix_is_compressed() -> None:
    """4 x 12 is 48 numbers; rank 3 sends 3 (4 + 12) = 48, not fewer; rank 2 sends 32."""
    gradient = gaussian((4, 3, 2, 2), 0)
    for rank, rate, start in [(3, 1.0, 0), (2, 1.5, 0), (2, 1.0, 1), (2, 1.0, 0), (3, 0.9, 0)]:
        hyper = {"rank": rank, "min_compression_rate": rate, "start_compressing_at": start}
        query = gaussian((12, rank), 1)
        reference = single((4, 3, 2, 2), 1, query, **hyper)
        reference.step([[gradient]])
        compressed = (rank, rate, start) in [(2, 1.0, 0), (3, 0.9, 0)]
        assert torch.equal(reference.last_updates[0], gradient) != compressed
        assert bool(reference.errors[0][0].any()) == compressed
        # An error of a time of compression joins the next uncompressed exchange.
        left = reference.errors[0][0]
        reference.hyperparameters[0].start_compressing_at = 2
        reference.step([[gradient]])
        assert torch.equal(reference.last_updates[0], gradient + left)
        assert not reference.errors[0][0].any()
