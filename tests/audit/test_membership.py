"""Who was a member shows in losses and messages; noise bounds how well."""

import math
import statistics
from statistics import NormalDist

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from efsgd.audit import (
    auc_under_noise,
    likelihood_ratios,
    loss_scores,
    separation,
    update_scores,
)
from tests.audit.messages import clear, entries, gradients_of, message, mlp


def test_scores_are_losses_and_products_with_gradients_sample_by_sample() -> None:
    model = mlp()
    inputs, labels = torch.rand(5, 6, dtype=torch.float64), torch.arange(5) % 4
    gradients = gradients_of(model, inputs[:2], labels[:2])
    seen = message([entries(0, gradients[0], 9), *map(clear, (1, 2, 3), gradients[1:])])
    for number, (loss_score, update_score) in enumerate(
        zip(
            loss_scores(model, inputs, labels),
            update_scores(seen, model, inputs, labels),
            strict=True,
        )
    ):
        one = slice(number, number + 1)
        own = torch.cat([g.flatten() for g in gradients_of(model, inputs[one], labels[one])])
        sent = torch.cat([each.decompressed.flatten() for each in seen.parameters])
        torch.testing.assert_close(loss_score, -cross_entropy(model(inputs[one]), labels[one]))
        torch.testing.assert_close(update_score, own @ sent / own.norm())


def test_a_batch_shows_in_its_message() -> None:
    model = mlp(inputs=400)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(40, 400, dtype=torch.float64, generator=generator)
    labels = torch.arange(40) % 4
    members = 8
    gradients = gradients_of(model, inputs[:members], labels[:members])
    seen = message([clear(index, each) for index, each in enumerate(gradients)])
    scores = update_scores(seen, model, inputs, labels)
    assert separation(scores[:members], scores[members:]).auc > 0.9


def test_ratios_are_those_of_normal_densities() -> None:
    generator = torch.Generator().manual_seed(1)
    shadows = 3 * torch.randn(12, 5, generator=generator, dtype=torch.float64)
    target = torch.randn(5, generator=generator, dtype=torch.float64)
    is_member = torch.stack([torch.randperm(12, generator=generator) < 5 for _ in range(5)], 1)
    found = likelihood_ratios(target, shadows, is_member)
    densities = []
    for of_kind, count in ((is_member, 5), (~is_member, 7)):
        own = [shadows[of_kind[:, n], n].tolist() for n in range(5)]
        assert {len(each) for each in own} == {count}
        deviation = math.sqrt(statistics.mean(statistics.variance(each) for each in own))
        densities.append(
            [
                NormalDist(statistics.mean(each), deviation).pdf(value)
                for each, value in zip(own, target.tolist(), strict=True)
            ]
        )
    expected = [math.log(a / b) for a, b in zip(*densities, strict=True)]
    # Some dozens of operations in float64, on numbers up to ten.
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-6, atol=1e-6)
    # Of samples alone: no other's score plays a part but through the variance.
    assert found.dtype == torch.float64


def test_ratios_tell_members_where_a_threshold_cannot() -> None:
    """Samples are easy or hard for all models, by far more than membership changes."""
    generator = torch.Generator().manual_seed(0)
    models, samples, shift = 64, 2000, 1.0
    hardness = 10 * torch.randn(samples, generator=generator)
    is_member = torch.rand(models + 1, samples, generator=generator) < 0.5
    noise = torch.randn(models + 1, samples, generator=generator)
    scores = hardness + shift * is_member + noise
    found = likelihood_ratios(scores[0], scores[1:], is_member[1:])
    aucs = [
        separation(each[is_member[0]], each[~is_member[0]], resamples=1).auc
        for each in (scores[0], found)
    ]
    # Φ(1 / √2) is what known means allow; an AUC of 1000 each has a deviation of about 0.011, and
    # means of 32 models take some away.
    assert aucs[0] < 0.55 and abs(aucs[1] - 0.760) < 0.04


def test_ratios_need_models_of_both_kinds() -> None:
    scores = torch.zeros(4, 2)
    is_member = torch.tensor([[True, True], [True, False], [False, False], [False, False]])
    with pytest.raises(ValueError, match="two models at least"):
        likelihood_ratios(scores[0], scores, is_member)
    with pytest.raises(ValueError, match=r"of shapes \[2\], \[4, 2\] and \[3, 2\]"):
        likelihood_ratios(scores[0], scores, is_member[1:])


class Target(nn.Module):
    """Its loss is minus the product of parameter and input: the gradient is minus the input."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return -inputs @ self.weight


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_noise_bounds_what_a_message_tells(sigma: float) -> None:
    # Clipped gradients of norm one, orthogonal to each other: nothing is more exposed.
    records, steps = 40, 25
    model, basis = Target(64), torch.eye(64, dtype=torch.float64)[:records]
    generator = torch.Generator().manual_seed(0)
    members, others = [], []
    for step in range(steps):
        is_member = torch.rand(records, generator=generator) < 0.5
        noise = torch.randn(64, generator=generator, dtype=torch.float64)
        sent = -basis[is_member].sum(0) + sigma * noise
        scores = update_scores(
            message([clear(0, sent)], step), model, basis, torch.zeros(records),
            loss=lambda outputs, labels: outputs.mean(),
        )  # fmt: skip
        members.append(scores[is_member])
        others.append(scores[~is_member])
    found = separation(torch.cat(members), torch.cat(others), resamples=10)
    bound = auc_under_noise(sigma)
    # It is reached by these, up to four standard deviations of an AUC of 500 each.
    assert abs(found.auc - bound) < 4 * math.sqrt(1 / (6 * 500))


def test_the_bound_is_between_guessing_and_knowing() -> None:
    assert auc_under_noise(0) == 1.0 and auc_under_noise(1e9) == pytest.approx(0.5)
    assert [round(auc_under_noise(sigma), 3) for sigma in (1, 4)] == [0.760, 0.570]
    with pytest.raises(ValueError, match="noise_multiplier"):
        auc_under_noise(-1.0)
