"""Benchmarks of the audit: models that are trained at once, and what is compared with peers."""

import importlib.util
import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from benchmarks import audit_lira, audit_peers
from efsgd import ErrorFeedbackSGD
from efsgd.audit import invert
from efsgd.audit.inversion import _start
from efsgd.audit.objective import FrozenModel
from efsgd.privacy import PrivateOptimizer
from examples.audit_membership import METHODS

# ---- shadow models ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["Rank 1", "Top-K 5 %", "SGD, σ = 4"])
def test_models_that_train_at_once_are_those_that_train_alone(method: str) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs, labels = torch.rand(80, 64, generator=generator), torch.arange(80) % 10
    members = torch.stack([torch.randperm(80, generator=generator)[:40] for _ in range(3)])
    together = audit_lira.train(method, inputs, labels, members, epochs=1)
    alone = _trained(method, inputs, labels, members)
    for own, expected in zip(together, alone, strict=True):
        # Sums of products in float32 in another order, in two steps.
        torch.testing.assert_close(own[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(together[0][0], together[0][1])


def _trained(
    method: str, inputs: torch.Tensor, labels: torch.Tensor, members: torch.Tensor
) -> list[torch.Tensor]:
    """The first model, with an optimizer of its own and gradients of one record after the other."""
    compressor, noise, lr = METHODS[method]
    parameters = [own[0] for own in audit_lira.first_values(len(members), seed=0)]
    optimizer: Any = ErrorFeedbackSGD(parameters, lr=lr, momentum_form="sgd", compressor=compressor)
    if noise is not None:
        optimizer = PrivateOptimizer(
            optimizer, noise_multiplier=noise, max_grad_norm=1.0,
            expected_batch_size=audit_lira.BATCH_SIZE, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    order = torch.randperm(members.shape[1], generator=torch.Generator().manual_seed(99))
    for batch in members[0][order].split(audit_lira.BATCH_SIZE):
        by_record = [
            torch.autograd.grad(
                cross_entropy(audit_lira.outputs(parameters, inputs[one]), labels[one]), parameters
            )
            for one in batch.split(1)
        ]
        for parameter, gradients in zip(parameters, zip(*by_record, strict=True), strict=True):
            parameter.grad = torch.stack(gradients).mean(0)
            if noise is not None:
                parameter.grad_sample = torch.stack(gradients)  # type: ignore[attr-defined]
        optimizer.step()
    return [each.detach() for each in parameters]


def test_confidences_are_logarithms_of_odds() -> None:
    logits = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5) % 4
    found = audit_lira.confidences(logits, labels)
    for model in range(2):
        for sample, label in enumerate(labels.tolist()):
            p = logits[model, sample].softmax(0)[label].item()
            assert found[model, sample].item() == pytest.approx(math.log(p / (1 - p)), rel=1e-12)


def test_shadow_models_tell_members_of_models_that_know_them() -> None:
    generator = torch.Generator().manual_seed(0)
    hardness = 10 * torch.randn(400, generator=generator)
    halves = torch.stack([torch.randperm(400, generator=generator) < 200 for _ in range(8)])
    is_member = torch.cat([halves, ~halves])
    noise = torch.randn(16, 400, generator=generator)
    found = audit_lira.attack(hardness + 2 * is_member + noise, is_member, [90.0] * 16)
    assert len(found) == 16
    # Φ(2 / √2) = 0.92 for means that are known; these are of eight.
    assert all(each.lira_auc > 0.85 > 0.65 > each.loss_auc for each in found)
    [_, accuracy, *_] = audit_lira.row("SGD", found)
    assert accuracy == "90.0 ± 0.0"


# ---- peers --------------------------------------------------------------------------------------


def test_both_programs_attack_one_message_from_the_same_starts() -> None:
    task = audit_peers.task("MLP", "Top-K 10 %", 2)
    sent = task.message.parameter(0).decompressed
    assert (sent != 0).sum() == int(0.1 * sent.numel())
    model = FrozenModel(task.model, cross_entropy, None)
    for attack, bounds in (("DLG", None), ("Inverting Gradients", (0.0, 1.0))):
        generator = torch.Generator().manual_seed(task.number)
        for start in task.starts(attack):
            assert torch.equal(start, _start(task.image.shape, model, bounds, generator))


def test_scores_are_compared_with_their_spread() -> None:
    assert audit_peers.agree([0.5, 0.7], [0.6, 0.8]) and audit_peers.agree([1.0, 1.0], [0.995] * 2)
    assert not audit_peers.agree([0.5, 0.52], [0.6, 0.61])
    image = torch.zeros(1, 1, 16, 16)
    score = audit_peers.Score.of(image, torch.full_like(image, -3.0))
    assert score == audit_peers.Score(1.0, 120.0, 0.0)  # within the bounds of images
    row = audit_peers.row_of("SGD", [score, score], [score, score])
    assert len(row) == 1 + len(audit_peers.COLUMNS) and row[3] == "yes"


@pytest.mark.skipif(importlib.util.find_spec("breaching") is not None, reason="it is installed")
def test_without_breaching_it_is_said_how_to_get_it() -> None:
    task = audit_peers.task("MLP", "SGD", 0)
    with pytest.raises(SystemExit, match=r"pip install --constraint constraints.txt breaching==0"):
        audit_peers.breaching("DLG", task)
    found = invert(task.message, task.model, task.image.shape, task.label)
    assert audit_peers.Score.of(task.image, found.inputs).ssim > 0.99
