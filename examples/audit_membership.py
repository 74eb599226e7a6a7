"""Who was trained on? By the losses of a trained model, and by messages on the way there."""

import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from opacus import GradSampleModule
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from efsgd import LQSGD, ErrorFeedbackSGD, PowerSGD, SignNorm, TopK
from efsgd.audit import (
    Message,
    auc_under_noise,
    loss_scores,
    observe,
    separation,
    update_scores,
)
from efsgd.compressors import Identity
from efsgd.privacy import PrivateOptimizer

MEMBERS, BATCH_SIZE, EPOCHS = 200, 20, 60
#: Every fifth message of the first four epochs is looked at.
WATCHED = range(0, 40, 5)
#: By name: a compressor, σ of differential privacy, a learning rate.
METHODS: dict[str, tuple[Any, float | None, float]] = {
    "SGD": (Identity(), None, 0.5),
    "Rank 1": (PowerSGD(1), None, 0.5),
    "Rank 4": (PowerSGD(4), None, 0.5),
    "LQ-SGD, rank 1": (LQSGD(1), None, 0.5),
    "Top-K 5 %": (TopK(0.05), None, 0.5),
    "Top-K 1 %": (TopK(0.01), None, 0.5),
    "Sign": (SignNorm(), None, 0.1),
    "SGD, σ = 1": (Identity(), 1.0, 0.5),
    "SGD, σ = 4": (Identity(), 4.0, 0.5),
}


@dataclass(frozen=True)
class Outcome:
    """What one training gave away.

    Attributes:
        method: of `METHODS`.
        seed: of model, records and batches.
        accuracy: of the final model on records that were not trained on.
        loss_auc: of members against others, by the losses of the final model.
        loss_tpr: with one other in a hundred taken for a member.
        batch_auc: of a batch against all others, by its message: the mean over messages.
    """

    method: str
    seed: int
    accuracy: float
    loss_auc: float
    loss_tpr: float
    batch_auc: float


def train_and_score(seed: int) -> Iterator[Outcome]:
    """One training with each method."""
    for method in METHODS:
        yield train(method, seed)


def train(method: str, seed: int, epochs: int = EPOCHS) -> Outcome:
    """One training of records, batches and first values that are the same for all methods."""
    compressor, noise, lr = METHODS[method]
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(seed))
    inputs = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    torch.manual_seed(seed)
    plain = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    model = plain if noise is None else GradSampleModule(plain)
    optimizer: Any = ErrorFeedbackSGD(
        model.parameters(), lr=lr, momentum_form="sgd", compressor=compressor
    )
    if noise is not None:
        optimizer = PrivateOptimizer(
            optimizer, noise_multiplier=noise, max_grad_norm=1.0, expected_batch_size=BATCH_SIZE,
            sample_rate=BATCH_SIZE / MEMBERS, generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
    generator = torch.Generator().manual_seed(seed + 99)
    batches = [
        batch
        for _ in range(epochs)
        for batch in torch.randperm(MEMBERS, generator=generator).split(BATCH_SIZE)
    ]
    aucs = []
    watched = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10))
    with observe(optimizer, steps=WATCHED) as recording, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        for step, batch in enumerate(batches):
            watched.load_state_dict(plain.state_dict())
            optimizer.zero_grad()
            cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
            if step in WATCHED:
                aucs.append(
                    _batch_auc(recording.messages(step=step)[0], watched, inputs, labels, batch)
                )
    losses = loss_scores(plain, inputs, labels)
    with torch.no_grad():
        right = plain(inputs[2 * MEMBERS :]).argmax(1) == labels[2 * MEMBERS :]
    told = separation(losses[:MEMBERS], losses[MEMBERS : 2 * MEMBERS], resamples=1)
    accuracy = 100 * right.float().mean().item()
    return Outcome(method, seed, accuracy, told.auc, told.tpr, statistics.mean(aucs))


def _batch_auc(
    message: Message, model: nn.Module, inputs: Tensor, labels: Tensor, batch: Tensor
) -> float:
    scores = update_scores(message, model, inputs[:MEMBERS], labels[:MEMBERS])
    is_member = torch.zeros(MEMBERS, dtype=torch.bool)
    is_member[batch] = True
    return separation(scores[is_member], scores[~is_member], resamples=1).auc


def membership_table(outcomes: Sequence[Outcome]) -> Table:
    """A row for each method."""
    table = Table(title="Membership: digits, 200 records", title_justify="left")
    table.add_column("Sent")
    for column in (
        "Test accuracy (%)", "Final losses (AUC)", "Their TPR at FPR 1 %", "Same batch (AUC)",
        "Bound",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for method, (_, noise, _) in METHODS.items():
        own = [outcome for outcome in outcomes if outcome.method == method]
        if own:
            columns = [
                ([outcome.accuracy for outcome in own], ".1f"),
                ([outcome.loss_auc for outcome in own], ".3f"),
                ([outcome.loss_tpr for outcome in own], ".3f"),
                ([outcome.batch_auc for outcome in own], ".3f"),
            ]
            bound = "" if noise is None else f"{auc_under_noise(noise):.3f}"
            table.add_row(method, *(_spread(*column) for column in columns), bound)
    return table


def _spread(values: Sequence[float], form: str) -> str:
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"
