"""The two kinds of tasks, and the hyper-parameters of the PowerSGD paper for them."""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.data.images import ImageData, crop_and_flip, steps_per_epoch, training_batches
from examples.data.text import Corpus, streams, windows
from examples.distributed import Workers
from examples.models import LSTMState
from examples.settings import Settings

# Those of the PowerSGD paper, with its form of momentum.
CIFAR10 = Settings(
    epochs=300, batch_size=128, lr=0.1, warmup_epochs=5, decay_at=(150 / 300, 250 / 300),
    momentum=0.9, nesterov=True, weight_decay=1e-4, momentum_form="paper",
)  # fmt: skip
WIKITEXT2 = Settings(
    epochs=90, batch_size=64, lr=1.25, warmup_epochs=5, decay_at=(60 / 90, 80 / 90), clip=0.4,
    momentum_form="paper",
)  # fmt: skip


class ImageClassification:
    """Images and their classes; the quality is the accuracy on the test set in percent.

    Args:
        data: the images.
        batch_size: images per worker and step.
        workers: the group this worker belongs to.
        padding: training images are displaced by up to this many pixels.
        flip: training images are mirrored with probability one half.
    """

    quality = "test accuracy (%)"

    def __init__(
        self, data: ImageData, batch_size: int, workers: Workers, padding: int, flip: bool
    ) -> None:
        self.data, self.batch_size, self.workers = data, batch_size, workers
        self.padding, self.flip = padding, flip
        images = len(data.train_labels)
        self.steps_per_epoch = steps_per_epoch(images, batch_size, workers.world_size)

    def batches(self, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This worker's share of an epoch, augmented."""
        worker, world_size = self.workers.worker, self.workers.world_size
        generator = torch.Generator().manual_seed((seed * 1_000 + epoch) * 10_007 + worker)
        shares = training_batches(self.data, self.batch_size, worker, world_size, seed, epoch)
        for number, (images, labels) in enumerate(shares):
            moved = crop_and_flip(images, self.padding, self.flip, generator)
            if number < start:
                continue  # it has had its share of the random numbers
            yield self._on_device(moved), labels.to(self.workers.device)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of a batch."""
        images, labels = batch
        return functional.cross_entropy(model(images), labels)

    def evaluate(self, model: nn.Module) -> float:
        """Accuracy on the test set in percent; every worker tests a part of it."""
        part = slice(self.workers.worker, None, self.workers.world_size)
        correct = 0
        images, labels = self.data.test_images[part], self.data.test_labels[part]
        for some, truth in zip(images.split(500), labels.split(500), strict=True):
            correct += int((model(self._on_device(some)).argmax(dim=1).cpu() == truth).sum())
        return 100 * self.workers.sum(correct)[0] / len(self.data.test_labels)

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing: batches do not depend on each other."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up nothing."""

    def _on_device(self, images: Tensor) -> Tensor:
        return self.data.normalize(images.to(self.workers.device))


class LanguageModeling:
    """The next word of a text; the quality is the perplexity on the test part.

    The training part is cut into contiguous streams, `batch_size` for every worker. A window of
    all streams is one step, and the LSTM's state is carried from window to window.

    Args:
        corpus: the text.
        batch_size: streams per worker.
        window: words per stream and step, through which gradients flow back.
        workers: the group this worker belongs to.
        test_streams: number of streams the test part is cut into, for any number of workers.
    """

    quality = "test perplexity"

    def __init__(
        self, corpus: Corpus, batch_size: int, window: int, workers: Workers, test_streams: int = 8
    ) -> None:
        self.window, self.workers = window, workers
        first = workers.worker * batch_size
        train = streams(corpus.train, workers.world_size * batch_size)
        self.train = train[:, first : first + batch_size].contiguous()
        self.test = streams(corpus.test, test_streams)[:, workers.worker :: workers.world_size]
        self.steps_per_epoch = math.ceil((len(self.train) - 1) / window)
        self._state: LSTMState | None = None

    def batches(self, seed: int, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This worker's streams, window by window; the order is that of the text, always."""
        if start == 0:
            self._state = None
        for inputs, targets in itertools.islice(windows(self.train, self.window), start, None):
            yield inputs.to(self.workers.device), targets.to(self.workers.device)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy per word of a window, in nats."""
        inputs, targets = batch
        logits, (hidden, cell) = model(inputs, self._state)
        self._state = hidden.detach(), cell.detach()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def evaluate(self, model: nn.Module) -> float:
        """Perplexity per word of the test part; every worker tests some of the streams."""
        nats, state = 0.0, None
        for inputs, targets in windows(self.test, self.window):
            if targets.numel() == 0:  # more workers than streams
                break
            inputs, targets = inputs.to(self.workers.device), targets.to(self.workers.device)
            logits, state = model(inputs, state)
            nats += functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="sum"
            ).item()
        total, words = self.workers.sum(nats, self.test[1:].numel())
        return math.exp(min(total / words, 700.0))  # finite even for a model that has diverged

    def state_dict(self) -> dict[str, Tensor]:
        """The LSTM's state after the last window."""
        return (
            {} if self._state is None else dict(zip(("hidden", "cell"), self._state, strict=True))
        )

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes it up for the next window."""
        device = self.workers.device
        if state:
            self._state = state["hidden"].to(device), state["cell"].to(device)
