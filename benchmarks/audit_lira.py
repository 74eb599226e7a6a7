"""Who was trained on, asked with shadow models: LiRA against each way to send a gradient.

    python -m benchmarks.audit_lira

Some dozens of models are trained, each on a random half of the same digits and every second on the
other half, with the settings of `examples/audit_membership.py`. Each in turn is attacked with all
others for shadows, by the ratio of likelihoods of Carlini et al. (arXiv:2112.03570), and by its
losses alone. The models of a method train at once: gradients come from `torch.func.vmap`, and one
optimizer has the parameters of all, each of which it compresses by itself. Private training clips
over the tensors of a model, so that each has an optimizer of its own there.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from benchmarks.results import describe_machine, show, write_results
from efsgd import ErrorFeedbackSGD
from efsgd.audit import likelihood_ratios, separation
from efsgd.privacy import PrivateOptimizer
from examples.audit_membership import BATCH_SIZE, EPOCHS, MEMBERS, METHODS

SHAPES = [(128, 64), (128,), (10, 128), (10,)]
FPR = 0.01


@dataclass(frozen=True)
class Outcome:
    """What attacks on one model found.

    Attributes:
        accuracy: of the model on digits that no model was trained on, per cent.
        lira_auc: with shadow models.
        lira_tpr: of its members, where one other in a hundred is taken for one.
        loss_auc: by the losses of the model alone.
        loss_tpr: the same by those.
    """

    accuracy: float
    lira_auc: float
    lira_tpr: float
    loss_auc: float
    loss_tpr: float


def outputs(parameters: Sequence[Tensor], inputs: Tensor) -> Tensor:
    """Of the MLP of `examples/audit_membership.py`, [..., 10]."""
    weight, bias, last_weight, last_bias = parameters
    return torch.tanh(inputs @ weight.mT + bias) @ last_weight.mT + last_bias


def loss(parameters: Sequence[Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    """The mean."""
    return cross_entropy(outputs(parameters, inputs), labels)


def sample_loss(parameters: Sequence[Tensor], inputs: Tensor, label: Tensor) -> Tensor:
    """Of one sample."""
    return loss(parameters, inputs[None], label[None])


def confidences(logits: Tensor, labels: Tensor) -> Tensor:
    """log(p / (1 - p)) of the probability of the label, [..., samples] of logits [..., classes]."""
    index = labels.expand(logits.shape[:-1])[..., None]
    own = logits.gather(-1, index)[..., 0]
    others = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
    return own - others


def first_values(models: int, seed: int) -> list[list[Tensor]]:
    """Of each tensor its first values in all models; uniform as those of `nn.Linear`."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape, inputs in zip(SHAPES, (64, 64, 128, 128), strict=True):
        values = torch.rand(models, *shape, generator=generator) * 2 - 1
        found.append([each.clone().requires_grad_() for each in values / inputs**0.5])
    return found


def train(
    method: str, inputs: Tensor, labels: Tensor, members: Tensor, epochs: int
) -> list[Tensor]:
    """Trains models [models] on members [models, members], at once; returns their parameters."""
    compressor, noise, lr = METHODS[method]
    tensors = first_values(len(members), seed=0)
    by_model = list(zip(*tensors, strict=True))
    settings: dict[str, Any] = {"lr": lr, "momentum_form": "sgd", "compressor": compressor}
    optimizers: list[Any]
    if noise is None:
        optimizers = [ErrorFeedbackSGD([p for own in by_model for p in own], **settings)]
        gradients_of = vmap(grad(loss))
    else:
        optimizers = [
            PrivateOptimizer(
                ErrorFeedbackSGD(own, **settings), noise_multiplier=noise, max_grad_norm=1.0,
                expected_batch_size=BATCH_SIZE, generator=torch.Generator().manual_seed(number),
            )
            for number, own in enumerate(by_model)
        ]  # fmt: skip
        gradients_of = vmap(vmap(grad(sample_loss), in_dims=(None, 0, 0)))
    generator = torch.Generator().manual_seed(99)
    for _ in range(epochs):
        order = torch.stack([own[torch.randperm(len(own), generator=generator)] for own in members])
        for batch in order.split(BATCH_SIZE, dim=1):
            values = [torch.stack([p.detach() for p in own]) for own in tensors]
            found = gradients_of(values, inputs[batch], labels[batch])
            for own, gradients in zip(tensors, found, strict=True):
                for parameter, gradient in zip(own, gradients, strict=True):
                    if noise is None:
                        parameter.grad = gradient
                    else:
                        parameter.grad_sample = gradient  # type: ignore[attr-defined]
            for optimizer in optimizers:
                optimizer.step()
    return [torch.stack([p.detach() for p in own]) for own in tensors]


def attack(scores: Tensor, is_member: Tensor, accuracies: Sequence[float]) -> list[Outcome]:
    """Each model in turn, with all others for shadows; scores are confidences [models, samples]."""
    found = []
    for number, accuracy in enumerate(accuracies):
        others = torch.arange(len(scores)) != number
        ratios = likelihood_ratios(scores[number], scores[others], is_member[others])
        own = is_member[number]
        # The loss falls as the confidence grows: they put samples in the same order.
        by_ratio, by_loss = (
            separation(each[own], each[~own], fpr=FPR, resamples=1)
            for each in (ratios, scores[number])
        )
        found.append(Outcome(accuracy, by_ratio.auc, by_ratio.tpr, by_loss.auc, by_loss.tpr))
    return found


def outcomes(method: str, models: int, epochs: int = EPOCHS) -> list[Outcome]:
    """Trains an even number of models, and attacks each of them."""
    digits = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(digits.data), generator=generator)
    inputs = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    halves = [torch.randperm(2 * MEMBERS, generator=generator) for _ in range(models // 2)]
    members = torch.stack(halves).view(-1, MEMBERS)
    is_member = torch.zeros(len(members), 2 * MEMBERS, dtype=torch.bool).scatter(1, members, True)
    trained = train(method, inputs, labels, members, epochs)
    logits = vmap(outputs, in_dims=(0, None))(trained, inputs)
    is_right = logits[:, 2 * MEMBERS :].argmax(-1) == labels[2 * MEMBERS :]
    accuracies = (100 * is_right.float().mean(1)).tolist()
    scores = confidences(logits[:, : 2 * MEMBERS], labels[: 2 * MEMBERS])
    return attack(scores, is_member, accuracies)


def row(method: str, found: Sequence[Outcome]) -> list[str]:
    """Means and standard deviations over the models that were attacked."""
    cells = [method]
    for name, form in (
        ("accuracy", ".1f"), ("loss_auc", ".3f"), ("loss_tpr", ".3f"), ("lira_auc", ".3f"),
        ("lira_tpr", ".3f"),
    ):  # fmt: skip
        values = [getattr(each, name) for each in found]
        cells.append(f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form}}")
    return cells


def main(command_line: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit_lira", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--models", type=int, default=32, help="of each method, an even number")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the outcomes there")
    arguments = parser.parse_args(command_line)
    torch.set_num_threads(1)
    console = Console(stderr=True)
    methods = track(
        arguments.methods, "Models", console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    found = {method: outcomes(method, arguments.models) for method in methods}
    columns = ["Sent", "Test accuracy (%)", "Losses, AUC", "TPR at FPR 1 %", "LiRA, AUC"]
    show(
        f"{arguments.models} models of each, trained on {MEMBERS} of {2 * MEMBERS} digits",
        [*columns, "TPR at FPR 1 %"],
        [row(method, own) for method, own in found.items()],
    )
    settings = {"models": arguments.models, "methods": arguments.methods}
    results = {method: [asdict(each) for each in own] for method, own in found.items()}
    write_results(
        arguments.output, "audit_lira", describe_machine(1), settings, {"outcomes": results}
    )


if __name__ == "__main__":
    main()
