"""What is trained in stages: scikit-learn's digits, Python's help topics in words, and CIFAR-10."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from examples.data import cifar10, digits, text
from examples.data.images import crop_and_flip
from examples.models import CifarResNet18


def as_they_are(inputs: Tensor, generator: Generator | None) -> Tensor:
    """Inputs that need no preparation."""
    return inputs


@dataclass(frozen=True)
class StagedTask:
    """Data of fixed batch sizes, and a model in equally many stages as there are processes.

    Attributes:
        title: of its table.
        quality: what quality means.
        train: inputs and targets, [samples, ...].
        test: the same.
        batch_size: samples in a step.
        microbatches: in a batch.
        epochs: how often all are trained on.
        lr: learning rate of SGD with momentum 0.9.
        weight_decay: of all parameters.
        clip: largest norm of the gradient of a stage; None for no limit.
        is_cosine: whether the learning rate falls to zero, epoch by epoch, as a cosine does.
        prepare: makes what the first stage is given of inputs; with a generator, which is for
            training, at random.
    """

    title: str
    quality: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    batch_size: int
    microbatches: int
    epochs: int
    lr: float
    weight_decay: float = 0.0
    clip: float | None = 1.0
    is_cosine: bool = False
    prepare: Callable[[Tensor, Generator | None], Tensor] = as_they_are

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross-entropy."""
        return functional.cross_entropy(output.flatten(0, -2), target.flatten())

    def score(self, output: Tensor, target: Tensor) -> float:
        """Accuracy in percent, or perplexity."""
        if target.ndim == 1:
            return 100 * (output.argmax(1) == target).float().mean().item()
        return math.exp(min(700.0, self.loss(output, target).item()))


class Recurrent(nn.Module):
    """An LSTM of one layer, from a state of zeros in each window."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x)
        return output


def digits_in_stages(stages: int) -> tuple[StagedTask, list[nn.Sequential]]:
    """A small CNN; activations between stages are 16 x 8 x 8, 32 x 4 x 4 and 64."""
    data = digits.load()
    task = StagedTask(
        "Image classification: a CNN on scikit-learn's digits",
        "test accuracy (%)",
        (data.train_images / 16.0, data.train_labels),
        (data.test_images / 16.0, data.test_labels),
        batch_size=64, microbatches=4, epochs=10, lr=0.05,
    )  # fmt: skip
    parts = [
        [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()],
        [nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()],
        [nn.Flatten(), nn.Linear(512, 64), nn.ReLU()],
        [nn.Linear(64, 10)],
    ]
    return task, _joined(parts, stages)


def topics_in_stages(stages: int, window: int = 16) -> tuple[StagedTask, list[nn.Sequential]]:
    """A language model; activations between stages are 16 words x 64."""
    corpus = text.load_topics()
    parts = []
    for words in (corpus.train, corpus.test):
        count = (len(words) - 1) // window
        used = words[: count * window + 1]
        parts.append((used[:-1].view(count, window), used[1:].view(count, window)))
    task = StagedTask(
        "Language modeling: LSTMs on Python's help topics",
        "test perplexity",
        *parts,
        batch_size=64, microbatches=4, epochs=2, lr=1.0,
    )  # fmt: skip
    layers = [
        [nn.Embedding(len(corpus.vocabulary), 64)],
        [Recurrent(64)],
        [Recurrent(64)],
        [nn.Linear(64, len(corpus.vocabulary))],
    ]
    return task, _joined(layers, stages)


def cifar10_in_stages(stages: int, directory: Path) -> tuple[StagedTask, list[nn.Sequential]]:
    """ResNet18 as in the paper; activations between stages are 64 x 32², 128 x 16² and 256 x 8².

    Source: Rudakov et al., arXiv 2401.07788: boundaries, batches, learning rate and its schedule,
    momentum, weight decay. The number of microbatches, and how images are moved and mirrored, are
    ours.
    """
    data = cifar10.load(directory)

    def prepare(images: Tensor, generator: Generator | None) -> Tensor:
        moved = images if generator is None else crop_and_flip(images, 4, True, generator)
        return data.normalize(moved)

    task = StagedTask(
        "Image classification: ResNet18 on CIFAR-10",
        "test accuracy (%)",
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
        batch_size=128, microbatches=4, epochs=100, lr=0.01, weight_decay=5e-4, clip=None,
        is_cosine=True, prepare=prepare,
    )  # fmt: skip
    model = CifarResNet18()
    parts = [
        [model.conv1, model.bn1, nn.ReLU(), *model.layer1],
        [*model.layer2],
        [*model.layer3],
        [*model.layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.linear],
    ]
    return task, _joined(parts, stages)


def _joined(parts: list[list[nn.Module]], stages: int) -> list[nn.Sequential]:
    """The four parts in two or four stages."""
    each = len(parts) // stages
    return [
        nn.Sequential(*(layer for part in parts[n * each : (n + 1) * each] for layer in part))
        for n in range(stages)
    ]


def whole_batches(samples: int, size: int, order: Tensor) -> list[Tensor]:
    """Positions of batches of equal size: the last one is filled from the beginning."""
    count = -(-samples // size)
    return list(torch.cat([order, order])[: count * size].split(size))
