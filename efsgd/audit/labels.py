"""Which labels a batch had, from the gradient of the last layer's biases.

Improved Deep Leakage from Gradients, Zhao, Mopuri and Bilen, arXiv:2001.02610, for one sample: the
softmax less one at the label is the only negative entry, so that labels with negative entries are
there for certain. Label Leakage from Gradients, Wainakh et al., arXiv:2105.09369, for the others of
a batch.
"""

import torch
from torch import Tensor

from efsgd.audit.objective import FrozenModel
from efsgd.audit.observed import Message
from efsgd.checks import plain, require_integer


def label_of(message: Message, bias: int, batch: int = 1) -> Tensor:
    """Labels of the records, from what was sent of the last layer's bias under cross-entropy.

    The gradient of a logit is the mean of its probability less one for records of that class, so
    only classes that are there have a negative one. Of one record that is its label. Of more
    records every class that is returned is there, unless noise, error memories or compression of
    the bias have changed signs; others may be there as well, which `invert` guesses.

    Args:
        message: of one worker, or averages.
        bias: the index of the last bias [classes] among the optimizer's parameters.
        batch: the number of records.

    Returns:
        Int64 [at most `batch`], the most negative first; none where no entry that was sent is
        negative.

    Raises:
        KeyError: nothing was seen of the parameter.
        ValueError: `batch` is below 1.

    Source: Zhao, Mopuri, Bilen: "iDLG", 2020, arXiv 2001.02610.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.audit import label_of, observe
        >>> layer = torch.nn.Linear(6, 4)
        >>> optimizer = PowerSGDOptimizer(layer.parameters(), lr=0.1, momentum_form="sgd")
        >>> labels = torch.tensor([2])
        >>> torch.nn.functional.cross_entropy(layer(torch.ones(1, 6)), labels).backward()
        >>> with observe(optimizer) as recording:
        ...     optimizer.step()
        >>> label_of(recording.messages()[0], bias=1)
        tensor([2])
    """
    require_integer("batch", batch, 1, remedy="It is the number of records.")
    gradient = message.parameter(bias).decompressed.detach().flatten()
    ordered = gradient.argsort()
    return ordered[gradient[ordered] < 0][: plain(batch)]


def infer_labels(message: Message, model: FrozenModel, inputs: Tensor) -> Tensor | None:
    """All labels of a batch, ascending, int64: those of `label_of`, and for the others a guess.

    None where the last parameter is no vector of biases, or `label_of` finds nothing in it.

    What is expected of softmax is taken from the model's outputs for `inputs`, made-up ones, [n,
    ...] with n the size of the batch. It is assumed that the loss is the mean of cross-entropies.
    """
    with torch.no_grad():
        outputs = model(inputs)
    biases = message.parameters[-1] if message.parameters else None
    if biases is None or outputs.ndim != 2 or tuple(biases.shape) != (outputs.shape[1],):
        return None
    size, gradient = len(inputs), biases.decompressed.to(outputs.dtype)
    found = label_of(message, biases.index, size)
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
