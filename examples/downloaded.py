"""The two tasks of the PowerSGD paper, on files of data sets that one has to download."""

from pathlib import Path

from torch import nn

from examples.data import cifar10, text
from examples.distributed import Workers
from examples.models import CifarResNet18, LSTMLanguageModel
from examples.tasks import ImageClassification, LanguageModeling


def cifar10_task(
    batch_size: int, workers: Workers, *, directory: Path
) -> tuple[ImageClassification, nn.Module]:
    """CIFAR-10 from its binary files in a directory, and the paper's ResNet18."""
    data = cifar10.load(directory)
    task = ImageClassification(data, batch_size, workers, padding=4, flip=True)
    return task, CifarResNet18().to(workers.device)


def wikitext2_task(
    batch_size: int, workers: Workers, *, directory: Path
) -> tuple[LanguageModeling, nn.Module]:
    """WikiText-2 from its token files in a directory, and the paper's LSTM."""
    corpus = text.load_wikitext2(directory)
    model = LSTMLanguageModel(len(corpus.vocabulary), 650, 650, 3, dropout=0.4)
    return LanguageModeling(corpus, batch_size, 30, workers), model.to(workers.device)
