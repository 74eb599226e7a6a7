"""A report attacks what the optimizer really sent, and says what it cannot show."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from efsgd import ErrorFeedbackSGD, GradientAverager, PowerSGDOptimizer, TopK
from efsgd.audit import Attack, report
from efsgd.audit.report import BLIND, WARNING
from efsgd.privacy import PrivateOptimizer

QUICK = {"adaptive": Attack(iterations=40, restarts=1)}


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Sigmoid(), nn.Linear(12, 4))


def rank_one(model: nn.Module) -> PowerSGDOptimizer:
    return PowerSGDOptimizer(model.parameters(), lr=0.1, momentum_form="sgd", rank=1)


def images(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(20, 1, 6, 6, generator=generator)
    return pixels[first:last], torch.arange(20)[first:last] % 4


def test_one_image_through_rank_one_is_given_away(tmp_path: Path) -> None:
    found = report(model, rank_one, images(0, 1), others=images(5, 20), attacks=QUICK)
    assert [row.attack for row in found.rows] == [
        BLIND, "singular vectors", "by biases", "adaptive",
    ]  # fmt: skip
    assert found.best.score > 0.999 > 0.9 > found.blind.score
    assert found.membership is not None and found.membership.auc == 1.0
    # P and Q of 12x36 and 4x12, biases, and a word for each of four parameters and of the step.
    assert found.message_bytes == 4 * (12 + 36 + 4 + 12 + 12 + 4 + 5)
    text = str(found)
    assert WARNING.rstrip() in text and "(best)" in text and "AUC 1.00" in text
    assert json.loads(json.dumps(found.to_dict()))["best"] == found.best.attack
    found.save_picture(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000
    again = report(model, rank_one, images(0, 1), others=images(5, 20), attacks=QUICK)
    assert torch.equal(again.found["adaptive"], found.found["adaptive"])


def test_labels_and_an_order_of_groups_are_found() -> None:
    def reversed_groups(model: nn.Module) -> ErrorFeedbackSGD:
        groups = [{"params": [each]} for each in reversed(list(model.parameters()))]
        return ErrorFeedbackSGD(groups, lr=0.1, momentum_form="sgd", compressor=TopK(0.5))

    # The last parameter is a matrix then, so labels are looked for along with the input.
    found = report(
        model,
        reversed_groups,
        images(0, 1),
        labels_known=False,
        attacks={"adaptive": Attack(iterations=150, restarts=1)},
    )
    assert found.best.score > 0.95 and found.best.labels == 1.0
    assert found.membership is None


def test_more_steps_give_away_more() -> None:
    def sparse(model: nn.Module) -> ErrorFeedbackSGD:
        return ErrorFeedbackSGD(
            model.parameters(), lr=0.1, momentum_form="sgd", compressor=TopK(0.01)
        )

    one, eight = (
        report(model, sparse, images(0, 1), steps=steps, attacks=QUICK) for steps in (1, 8)
    )
    assert max(one.rows[-1].psnr) + 3 < max(eight.rows[-1].psnr)
    assert one.message_bytes == eight.message_bytes


def test_averagers_and_private_optimizers_are_observed_as_well() -> None:
    def averager(model: nn.Module) -> GradientAverager:
        return GradientAverager(model.parameters())

    def private(model: nn.Module) -> Any:
        return PrivateOptimizer(
            rank_one(model), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1,
            sample_rate=0.1, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip

    assert report(model, averager, images(0, 1), attacks={}).best.score > 0.999
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        noisy = report(lambda: GradSampleModule(model()), private, images(0, 1), attacks=QUICK)
    assert max(max(row.psnr) for row in noisy.rows[1:]) < 15


def test_what_are_no_images_is_scored_but_not_drawn(tmp_path: Path) -> None:
    rows = torch.rand(2, 36), torch.tensor([0, 1])
    found = report(model, rank_one, rows, attacks=QUICK, seconds=0.0)
    assert found.best.ssim is None and "–" in str(found)
    assert not found.rows[-1].is_complete and "out of time" in str(found)
    with pytest.raises(ValueError, match="Use `found` for others"):
        found.save_picture(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="one label for each input"):
        report(model, rank_one, (rows[0], rows[1][:1]))
