"""Which labels a batch had, from the gradient of the last layer's biases.

Improved Deep Leakage from Gradients, Zhao, Mopuri and Bilen, arXiv:2001.02610, for one sample: the
softmax less one at the label is the only negative entry. Label Leakage from Gradients, Wainakh et
al., arXiv:2105.09369, for batches.
"""

import torch
from torch import Tensor

from efsgd.audit.objective import FrozenModel
from efsgd.audit.observed import Message


def infer_labels(message: Message, model: FrozenModel, inputs: Tensor) -> Tensor | None:
    """Labels of a batch, ascending, int64; None where the last parameter's message has none.

    It has none where it is no vector of biases, or nothing in it is negative.

    What is expected of softmax is taken from the model's outputs for `inputs`, made-up ones, [n,
    ...] with n the size of the batch. It is assumed that the loss is the mean of cross-entropies.
    """
    with torch.no_grad():
        outputs = model(inputs)
    biases = message.parameters[-1] if message.parameters else None
    if biases is None or outputs.ndim != 2 or tuple(biases.shape) != (outputs.shape[1],):
        return None
    size, gradient = len(inputs), biases.decompressed.to(outputs.dtype)
    # A negative entry is a label for certain; of one sample the most negative one.
    found = gradient.argsort()[:size][: int((gradient < 0).sum())]
    if not len(found):
        return None
    # Of each class its count: what softmax gives, here a guess, less the gradient of the sum.
    counts = size * (outputs.softmax(1).mean(0) - gradient)
    counts[found] -= 1
    for _ in range(size - len(found)):
        label = counts.argmax()
        counts[label] -= 1
        found = torch.cat([found, label[None]])
    return found.sort().values
