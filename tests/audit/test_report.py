"""A report attacks what the optimizer really sent, and says what it cannot show."""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus import GradSampleModule
from torch import nn
from torch.nn.functional import cross_entropy

from efsgd import ErrorFeedbackSGD, GradientAverager, PowerSGDOptimizer, TopK
from efsgd.audit import Attack, Report, report
from efsgd.audit.findings import BLIND, GATHERED, WARNING
from efsgd.audit.victims import take_steps
from efsgd.privacy import PrivateOptimizer

QUICK = {"adaptive": Attack(iterations=40, restarts=1)}


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Sigmoid(), nn.Linear(12, 4))


def rank_one(model: nn.Module) -> PowerSGDOptimizer:
    return PowerSGDOptimizer(model.parameters(), lr=0.1, momentum_form="sgd", rank=1)


def rank_two(model: nn.Module) -> PowerSGDOptimizer:
    return PowerSGDOptimizer(model.parameters(), lr=0.1, momentum_form="sgd", rank=2)


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


def double() -> nn.Module:
    return model().double()


def of_workers(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One image for each."""
    return [(x.double(), y) for x, y in (images(n, n + 1) for n in range(count))]


def joined(
    batches: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.mark.parametrize("steps", [1, 3])
def test_averages_of_workers_say_what_one_worker_with_all_batches_would(steps: int) -> None:
    """P is linear in the gradient, and so is Q for one and the same P."""
    batches = of_workers(3)
    several, alone = (
        take_steps(double, rank_one, given, cross_entropy, steps, seed=4)
        for given in (batches, [joined(batches)])
    )
    assert several.averages is not None and several.averages.worker is None
    assert several.message.worker == 0
    assert several.averages.nbytes == several.message.nbytes  # where two workers add control words
    for average, own in zip(several.averages.parameters, alone.message.parameters, strict=True):
        for value, expected in zip(average.values, own.values, strict=True):
            # Sums of some dozens of numbers in float64, of no more than a hundred.
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    # The message of the first worker says less of others' batches, and so something else.
    own, together = (each.parameter(1).decompressed for each in (several.message, several.averages))
    assert float((own - together).norm()) > 0.1 * float(together.norm())


def test_averages_are_attacked_beside_messages(tmp_path: Path) -> None:
    batches = of_workers(2)
    others = tuple(each[5:] for each in images(0, 20))
    found = report(
        double, rank_two, batches[0], peers=batches[1:], others=(others[0].double(), others[1]),
        attacks={"adaptive": Attack(iterations=150, restarts=1)},
    )  # fmt: skip
    assert found.workers == 2 and found.averages is not None
    assert torch.equal(found.originals, batches[0][0])
    assert torch.equal(found.averages.originals, joined(batches)[0])
    # Two ranks hold the gradient of two records: the images of both workers are found.
    assert found.best.score > 0.999 and found.averages.best.score > 0.99
    assert found.averages.blind.ssim is not None and len(found.averages.blind.ssim) == 2
    assert found.averages.membership is not None and found.averages.membership.members == 2
    assert "Averages alone, of 2 workers, on their 2 samples" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["averages"]["best"] == "adaptive"
    found.averages.save_picture(tmp_path / "picture.png")


def test_of_gathered_payloads_there_are_no_averages() -> None:
    def sparse(model: nn.Module) -> ErrorFeedbackSGD:
        return ErrorFeedbackSGD(
            model.parameters(), lr=0.1, momentum_form="sgd", compressor=TopK(0.5)
        )

    batches = of_workers(2)
    found = report(double, sparse, batches[0], peers=batches[1:], attacks={})
    assert found.averages is None and GATHERED in str(found)
    with pytest.raises(ValueError, match=r"batches of sizes \[1, 2\]"):
        report(double, sparse, batches[0], peers=[joined(batches)], attacks={})


def test_noise_of_workers_is_averaged_and_must_differ() -> None:
    def private(model: nn.Module, generator: torch.Generator | None = None) -> Any:
        return PrivateOptimizer(
            rank_one(model), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=2,
            generator=generator,
        )  # fmt: skip

    def seeded(model: nn.Module) -> Any:
        return private(model, torch.Generator().manual_seed(0))

    batches = [images(n, n + 1) for n in range(2)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        found = report(
            lambda: GradSampleModule(model()), private, batches[0], peers=batches[1:], attacks=QUICK
        )
        assert found.averages is not None and len(found.averages.rows) == 3
        with pytest.raises(ValueError, match="draw the same noise"):
            report(
                lambda: GradSampleModule(model()), seeded, batches[0], peers=batches[1:], attacks={}
            )


def test_a_model_that_is_given_stays_as_it_is() -> None:
    own = double()
    before = {name: each.clone() for name, each in own.state_dict().items()}
    batches = of_workers(2)
    found = report(lambda: own, rank_one, batches[0], peers=batches[1:], attacks={})
    assert found.best.score > 0.999
    assert all(torch.equal(each, before[name]) for name, each in own.state_dict().items())
    assert all(each.grad is None for each in own.parameters())


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    written: list[str] = []
    is_watched = False

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        # Hooks stay for ever, so this one is deaf afterwards.
        if is_watched and event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            written.append(str(arguments[0]))

    def audited() -> Report:
        return report(model, rank_one, images(0, 1), others=images(5, 20), attacks=quick)

    quick = {"adaptive": Attack(iterations=1, restarts=1)}
    audited()  # what is imported on the way may be compiled
    sys.addaudithook(note)
    try:
        is_watched = True
        found = audited()
        str(found), found.to_dict()
        assert written == []
        found.save_picture(tmp_path / "picture.png")
        assert str(tmp_path / "picture.png") in written
    finally:
        is_watched = False


def test_what_are_no_images_is_scored_but_not_drawn(tmp_path: Path) -> None:
    rows = torch.rand(2, 36), torch.tensor([0, 1])
    found = report(model, rank_one, rows, attacks=QUICK, seconds=0.0)
    assert found.best.ssim is None and "–" in str(found)
    assert not found.rows[-1].is_complete and "out of time" in str(found)
    with pytest.raises(ValueError, match="Use `found` for others"):
        found.save_picture(tmp_path / "picture.png")
    with pytest.raises(ValueError, match="one label for each input"):
        report(model, rank_one, (rows[0], rows[1][:1]))
