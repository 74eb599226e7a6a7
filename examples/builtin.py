"""The two tasks on data that come with Python packages, and their hyper-parameters."""

from torch import nn

from examples.data import digits, text
from examples.distributed import Workers
from examples.models import DigitsCNN, LSTMLanguageModel
from examples.settings import Settings
from examples.tasks import ImageClassification, LanguageModeling

# For four workers; all ranks use them unchanged. The learning rate is the best of a few for
# torch.optim.SGD.
DIGITS = Settings(
    epochs=20, batch_size=16, lr=0.01, warmup_epochs=2, decay_at=(0.6, 0.85), momentum=0.9,
    nesterov=True, weight_decay=1e-4,
)  # fmt: skip
# Without momentum, as the paper trains its language model. (With Nesterov's momentum and longer
# training SGD gets further on this small text than a rank of 4 does.)
TOPICS = Settings(
    epochs=5, batch_size=8, lr=3.0, warmup_epochs=1, decay_at=(0.6, 0.85), windows_per_epoch=4,
)  # fmt: skip


def digits_task(batch_size: int, workers: Workers) -> tuple[ImageClassification, nn.Module]:
    """scikit-learn's handwritten digits, and a small CNN for them."""
    task = ImageClassification(digits.load(), batch_size, workers, padding=1, flip=False)
    return task, DigitsCNN().to(workers.device)


def topics_task(batch_size: int, workers: Workers) -> tuple[LanguageModeling, nn.Module]:
    """The help topics of Python, in words, and a small LSTM for them."""
    corpus = text.load_topics()
    model = LSTMLanguageModel(len(corpus.vocabulary), 64, 64, 1, dropout=0.2)
    return LanguageModeling(corpus, batch_size, 16, workers), model.to(workers.device)
