"""Scores agree with those of scikit-image, scikit-learn and scipy."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from sklearn.metrics import roc_auc_score, roc_curve

from efsgd.audit import best_match, label_recovery, psnr, separation, ssim


def images(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return first, (first + 0.2 * noise).clamp(0, 1)


@given(st.integers(0, 99), st.integers(11, 20), st.integers(11, 20), st.sampled_from([1.0, 2.0]))
def test_ssim_and_psnr_are_those_of_scikit_image(
    seed: int, height: int, width: int, data_range: float
) -> None:
    pairs = images(seed, 2, 3, height, width)
    for own, expected in (
        (ssim(*pairs, data_range=data_range), _ssim),
        (psnr(*pairs, data_range=data_range), peak_signal_noise_ratio),
    ):
        theirs = [
            expected(x.numpy(), y.numpy(), data_range=data_range)
            for x, y in zip(*pairs, strict=True)
        ]
        # Sums of 121 products in another order.
        torch.testing.assert_close(own, torch.tensor(theirs), rtol=1e-12, atol=1e-12)


def _ssim(x: numpy.ndarray, y: numpy.ndarray, data_range: float) -> float:
    found: float = structural_similarity(
        x, y, channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        data_range=data_range,
    )  # fmt: skip
    return found


def test_pixels_of_small_images_are_repeated() -> None:
    x, y = images(0, 1, 1, 8, 12)
    larger = [each.repeat_interleave(2, 2).repeat_interleave(2, 3) for each in (x, y)]
    assert ssim(x, y) == ssim(*larger)


def test_equal_images_score_one_and_at_most_120_decibels() -> None:
    x, _ = images(1, 2, 1, 12, 12)
    assert ssim(x, x).tolist() == [1.0, 1.0] and psnr(x, x).tolist() == [120.0, 120.0]


@given(st.integers(0, 999), st.integers(1, 9))
def test_the_best_match_is_a_cheapest_assignment(seed: int, count: int) -> None:
    x, y = torch.rand(2, count, 3, generator=torch.Generator().manual_seed(seed))
    costs = (x[:, None] - y[None]).double().square().sum(2)
    found = best_match(x, y)
    assert sorted(found.tolist()) == list(range(count))
    rows, columns = linear_sum_assignment(costs)
    # Sums of few doubles, in another order.
    torch.testing.assert_close(costs[range(count), found].sum(), costs[rows, columns].sum())


def test_labels_in_another_order_are_recovered() -> None:
    assert label_recovery(torch.tensor([1, 2, 2]), torch.tensor([2, 1, 2])) == 1.0
    assert label_recovery(torch.tensor([1, 2, 2]), torch.tensor([2, 0, 1])) == 2 / 3


@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.01, 0.2]))
def test_auc_and_tpr_are_those_of_scikit_learn(
    seed: int, members: int, others: int, fpr: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(9, (n,), generator=generator) / 8 for n in (members, others))  # with ties
    found = separation(x + 0.25, y, fpr=fpr, resamples=20)
    truth, scores = [1] * members + [0] * others, torch.cat([x + 0.25, y]).numpy()
    assert found.auc == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    rates, hits, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert found.tpr == pytest.approx(hits[rates <= fpr + 1e-12].max(), abs=1e-12)


def test_intervals_are_of_the_width_that_theory_gives_and_repeat_by_seed() -> None:
    x, y = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    found = separation(x, y)
    assert found == separation(x, y) and found != separation(x, y, seed=1)
    low, high = found.auc_interval
    assert low < found.auc < high
    # Without any difference AUC varies by sqrt((m + n + 1) / (12 m n)) = 0.0204.
    assert 0.8 < (high - low) / (2 * 1.96 * 0.0204) < 1.2
    assert found.tpr_interval[0] <= found.tpr <= found.tpr_interval[1]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="must be equal"):
        psnr(torch.zeros(1, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="Must be images"):
        ssim(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="none of them NaN"):
        separation(torch.tensor([torch.nan]), torch.zeros(1))
