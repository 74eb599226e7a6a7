"""SpectralAtomo: what is sent of a tensor, by each worker for itself, and its mean."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from efsgd import ErrorFeedbackSGD
from efsgd.compressors import spectral_atomo
from efsgd.compressors.spectral_atomo import (
    SpectralAtomo,
    atomo_shape,
    inclusion_probabilities,
    systematic_sample,
)
from efsgd.randomness import Draws
from efsgd.testing.gradients import gaussian
from efsgd.testing.strategies import Shape, seeds, shapes
from tests.compressors.test_atoms import exactly, second_moment
from tests.compressors.test_quantized_compressors import decompressed
from tests.simulation import difference, parameters_of, replicated, step_with

SHARED = Draws(0, 0, 0, worker=None)


matrices = st.tuples(st.integers(1, 7), st.integers(1, 7))


# ---- what is sent -------------------------------------------------------------------------------


@settings(max_examples=60)
@given(shape=matrices, rank=st.integers(1, 4), deficient=st.booleans(), seed=seeds())
def test_the_mean_is_the_matrix_and_the_second_moment_is_the_least(
    shape: Shape, rank: int, deficient: bool, seed: int
) -> None:
    """Exactly: over all draws, each as often as it is drawn."""
    delta = gaussian(shape, seed)
    if deficient:
        delta = torch.outer(gaussian(shape[:1], seed, 1), gaussian(shape[1:], seed, 2))
    compressor = SpectralAtomo(rank)
    count = min(*shape, rank)
    values = torch.linalg.svdvals(delta / delta.abs().max())
    probabilities = inclusion_probabilities(values, count)
    mean, moment = torch.zeros_like(delta), 0.0
    with pytest.MonkeyPatch.context() as patch:
        for draw, length in exactly(probabilities):
            patch.setattr(
                spectral_atomo,
                "systematic_sample",
                lambda p, s, _, draw=draw: systematic_sample(p, s, draw),
            )
            sent = decompressed(compressor, delta)
            mean += length * sent
            moment += length * float(sent.square().sum())
    assert difference(mean, delta) <= 1e-12
    least = second_moment(values, probabilities) * float(delta.abs().max()) ** 2
    assert abs(moment - least) <= 1e-11 * least
    # Uniform probabilities would be unbiased, too, so that this bounds the best.
    assert moment <= min(shape) / count * float(delta.square().sum()) * (1 + 1e-12)


def test_rejection_is_biased_and_says_so() -> None:
    delta = torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))
    p = torch.tensor([1.0, 4 / 7, 2 / 7], dtype=torch.float64)  # 2 σ / Σσ, where not above 1
    # The first is sure, and of the others exactly one is kept.
    second, third = float(p[1] * (1 - p[2])), float(p[2] * (1 - p[1]))
    share = second / (second + third)
    many = 2000
    compressor = SpectralAtomo(2, sampling="rejection")
    assert not compressor.claims().is_unbiased
    sent = torch.stack([decompressed(compressor, delta, step).diag() for step in range(many)])
    assert torch.allclose(sent[:, 0], delta[0, 0], atol=1e-14)
    expected = torch.tensor([share * 2 / p[1], (1 - share) * 1 / p[2]])
    errors = sent[:, 1:].std(0) / math.sqrt(many)
    assert bool(((sent[:, 1:].mean(0) - expected).abs() <= 6 * errors).all())  # one in 2e8
    assert bool(expected[0] - delta[1, 1] > 12 * errors[0])


def test_where_rejection_finds_nothing_the_largest_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    delta = gaussian((6, 5), 1)
    u, values, v = torch.linalg.svd(delta, full_matrices=False)
    monkeypatch.setattr(spectral_atomo, "_TRIES", 0)
    sent = decompressed(SpectralAtomo(2, sampling="rejection"), delta)
    assert difference(sent, (u[:, :2] * values[:2]) @ v[:2]) < 1e-13


@pytest.mark.parametrize("sampling", ["atomo", "rejection"])
@given(shape=shapes(), seed=seeds())
def test_tensors_of_few_atoms_are_sent_whole(sampling: str, shape: Shape, seed: int) -> None:
    assume(math.prod(shape) > 0)
    delta = gaussian(shape, seed)
    n, m = atomo_shape(shape)
    compressor = SpectralAtomo(rank=min(n, m), sampling=sampling)
    if sampling == "atomo":
        assert difference(decompressed(compressor, delta), delta) < 1e-13
    one = torch.outer(gaussian((n,), seed, 1), gaussian((m,), seed, 2)).view(shape)
    # One value, and others that are rounding: in a sample or not, they do not matter.
    two = SpectralAtomo(rank=2) if sampling == "atomo" else SpectralAtomo(1, sampling)
    assert difference(decompressed(two, one), one) < 1e-13
    for zero in (torch.zeros(shape), torch.zeros(shape, dtype=torch.float64)):
        assert not decompressed(compressor, zero).any()


def test_bringing_a_tensor_to_scale_changes_no_digit() -> None:
    """What the decomposition of a diagonal matrix leaves as it is, is sent as it is."""
    for seed in range(30):
        delta = torch.diag(gaussian((4,), seed).float())
        assert torch.equal(decompressed(SpectralAtomo(4), delta), delta)


# ---- shapes, sizes, workers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((), (1, 1)),
        ((1,), (1, 1)),
        ((10,), (5, 2)),
        ((7,), (7, 1)),
        ((10, 512), (10, 512)),
        ((5, 3), (5, 3)),
        ((64, 32, 1, 1), (64, 32)),
        ((5, 3, 1), (5, 3)),
        ((64, 3, 3, 3), (96, 18)),
        ((64, 3, 1, 3), (96, 6)),
        ((5, 3, 3, 3), (5, 27)),
        ((1, 1, 4), (1, 4)),
        ((2, 1, 4), (1, 8)),
    ],
)
def test_tensors_are_seen_as_the_matrices_of_the_paper_s_code(
    shape: Shape, expected: tuple[int, int]
) -> None:
    assert atomo_shape(shape) == expected


@given(shapes())
def test_no_element_is_left_out_of_a_matrix(shape: Shape) -> None:
    assert math.prod(atomo_shape(shape)) == math.prod(shape)


@pytest.mark.parametrize("sampling", ["atomo", "rejection"])
def test_workers_draw_for_themselves_and_apply_the_same_mean(sampling: str) -> None:
    sizes, workers = [(8, 6), (4, 4, 3), (10,), ()], []
    compressor = SpectralAtomo(2, sampling)
    for _ in range(3):
        own = [torch.zeros(s, dtype=torch.float64).requires_grad_() for s in sizes]
        options: dict[str, Any] = {"lr": 1.0, "momentum_form": "sgd", "error_feedback": False}
        groups = [{"params": own[:1]}, {"params": own[1:], "rank": 1}]
        workers.append(ErrorFeedbackSGD(groups, compressor=compressor, **options))
    gradients = [[gaussian(shape, 1, i) for i, shape in enumerate(sizes)]] * 3  # alike
    before = torch.get_rng_state()
    step_with(workers, gradients)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(replicated(worker) == replicated(workers[0]) for worker in workers)
    for index, update in enumerate(parameters_of(workers[0])):
        own_compressor = SpectralAtomo(2 if index == 0 else 1, sampling)
        sent = [
            own_compressor.decompress(
                own_compressor.compress(gradients[0][index], Draws(0, index, 0, worker)),
                update.shape,
                SHARED,
            )
            for worker in range(3)
        ]
        assert difference(-update, torch.stack(sent).mean(0)) < 1e-14
        if index == 0:
            assert not torch.equal(sent[0], sent[1]) or not torch.equal(sent[0], sent[2])
