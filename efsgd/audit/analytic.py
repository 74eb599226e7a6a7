"""What messages give away without any search: inputs and labels that algebra reads off them.

Of a linear layer y = W x + b the gradients of one record are dW = δ xᵀ and db = δ, where δ is the
gradient of y. So every row of dW is x times a number that db has, and P̂Qᵀ of rank 1 is dW itself.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from efsgd.audit.observed import Message, Observed
from efsgd.checks import plain, require_integer


def linear_inputs(message: Message, weight: int, bias: int | None = None) -> Tensor:
    """The input of a linear layer, from what was sent of its gradients for one record.

    With the bias it is the weight's gradient over the bias's, by least squares over the elements
    that were sent: exact where both were sent in clear, where the weight was sent at any rank,
    since the gradient of one record has rank 1, and where of each column any element was sent whose
    bias was sent as well. Without, it is the direction of the input: the leading right singular
    vector, which of rank 1 is Q. For several records it is a weighted sum of their inputs.

    What error memories add to later messages spoils it; the first step has none.

    Args:
        message: of one worker, or averages.
        weight: the index of the weight [out, in] among the optimizer's parameters.
        bias: the index of the bias [out]; None: it is not known, or there is none.

    Returns:
        [in]; without a bias of norm 1, with a sum that is not negative.

    Raises:
        KeyError: nothing was seen of the parameter.
        ValueError: the weight is no matrix, the bias does not belong to it, or all of its gradient
            is zero.

    Sources: Phong et al., IEEE TIFS 2018 (the quotient); for factors, the algebra above.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.audit import linear_inputs, observe
        >>> layer, x = torch.nn.Linear(6, 4), torch.arange(6.0)
        >>> optimizer = PowerSGDOptimizer(
        ...     layer.parameters(), lr=0.1, momentum_form="sgd", rank=1
        ... )
        >>> layer(x).square().sum().backward()
        >>> with observe(optimizer) as recording:
        ...     optimizer.step()
        >>> (message,) = recording
        >>> linear_inputs(message, 0, 1).round(decimals=3).tolist()
        [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """
    if bias is None:
        return singular_inputs(message, weight)[0]
    rows, divisors = _matrix(message, weight), _find(message, bias).decompressed.detach()
    if divisors.shape != rows.shape[:1]:
        raise ValueError(
            f"Invalid bias: parameter {bias} has shape {list(divisors.shape)}. Must be the bias "
            f"[{len(rows)}] of the weight {list(rows.shape)}."
        )
    # What was not sent is zero. So are rows whose divisor is, which count for nothing.
    weights = divisors[:, None] * (rows != 0)
    squares = weights.square().sum(0)
    if not bool(squares.any()):
        raise ValueError(
            "The gradient of the bias is zero: this record has none, or nothing of it was sent. "
            "Leave bias out, or take another message."
        )
    products = (weights * rows).sum(0)
    return torch.where(squares > 0, products / squares, 0.0)


def label_of(message: Message, bias: int, batch: int = 1) -> Tensor:
    """Labels of the records, from what was sent of the last layer's bias under cross-entropy.

    The gradient of a logit is the mean of its probability less one for records of that class, so
    only classes that are there have a negative one. Of one record that is its label. Of more
    records every class that is returned is there, unless error memories or compression of the bias
    have changed signs; others may be there as well.

    Args:
        message: of one worker, or averages.
        bias: the index of the last bias [classes] among the optimizer's parameters.
        batch: the number of records.

    Returns:
        Int64 [at most `batch`], the most negative first.

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
    gradient = _find(message, bias).decompressed.detach().flatten()
    ordered = gradient.argsort()
    if batch == 1:
        return ordered[:1]
    return ordered[gradient[ordered] < 0][: plain(batch)]


def singular_inputs(message: Message, weight: int, count: int = 1) -> Tensor:
    """Directions of inputs of a linear layer: leading right singular vectors of what was sent.

    The gradient of the weight is Σ δ xᵀ over the records. Noise that was added to each of its
    elements hardly turns the leading vector as long as the singular value is above that of the
    noise, √out + √in times its standard deviation; a search over inputs finds nothing long before.

    Args:
        message: of one worker, or averages.
        weight: the index of the weight [out, in] among the optimizer's parameters.
        count: how many.

    Returns:
        [count, in], orthonormal, each with a sum that is not negative: singular vectors have no
        sign, and inputs that are images have no negative sum.

    Raises:
        KeyError: nothing was seen of the parameter.
        ValueError: the weight is no matrix, or `count` is out of range.

    Example:
        >>> from efsgd import Identity, ErrorFeedbackSGD
        >>> from efsgd.audit import observe, singular_inputs
        >>> layer = torch.nn.Linear(3, 4)
        >>> optimizer = ErrorFeedbackSGD(
        ...     layer.parameters(), lr=0.1, momentum_form="sgd", compressor=Identity()
        ... )
        >>> layer(torch.tensor([0.0, 3.0, 4.0])).square().sum().backward()
        >>> with observe(optimizer) as recording:
        ...     optimizer.step()
        >>> singular_inputs(recording.messages()[0], 0).mul(5).abs().round().tolist()
        [[0.0, 3.0, 4.0]]
    """
    gradient = _matrix(message, weight)
    most = "A matrix has no more singular vectors."
    require_integer("count", count, 1, min(gradient.shape), remedy=most)
    right = torch.linalg.svd(gradient, full_matrices=False).Vh[: plain(count)]
    return torch.where(right.sum(dim=1, keepdim=True) < 0, -right, right)


def mean_gradients(messages: Iterable[Message]) -> dict[int, Tensor]:
    """What messages of several steps say together of a gradient that stayed the same.

    With error feedback what a message left out comes later. For a gradient g that is the same in T
    steps from an error memory of zero, the mean differs from g by exactly e_T / T, where e_T is the
    error memory after them. Without error feedback it stays as wrong as the first message.

    Args:
        messages: of one worker in steps that were applied, from the first on.

    Returns:
        By index of the parameter, the mean of what was decompressed, of the parameter's shape.

    Raises:
        ValueError: there are none.

    Source: Karimireddy, Rebjock, Stich, Jaggi, ICML 2019, arXiv 1901.09847, for error feedback.

    Example:
        >>> from efsgd import ErrorFeedbackSGD, TopK
        >>> from efsgd.audit import mean_gradients, observe
        >>> x = torch.zeros(2, requires_grad=True)
        >>> optimizer = ErrorFeedbackSGD(
        ...     [x], lr=0.0, momentum_form="sgd", compressor=TopK(density=0.5)
        ... )
        >>> with observe(optimizer) as recording:
        ...     for _ in range(4):
        ...         x.grad = torch.tensor([3.0, 2.0])
        ...         optimizer.step()
        >>> mean_gradients(recording)[0].tolist(), optimizer.state[x]["error"].tolist()
        ([2.25, 2.0], [3.0, 0.0])
    """
    sums, count = dict[int, Tensor](), 0
    for message in messages:
        count += 1
        for each in message.parameters:
            own = each.decompressed.detach()
            sums[each.index] = sums[each.index] + own if each.index in sums else own
    if count == 0:
        raise ValueError("There are no messages. Observe steps, and pass what was recorded.")
    return {index: total / count for index, total in sums.items()}


def _find(message: Message, index: int) -> Observed:
    for each in message.parameters:
        if each.index == index:
            return each
    seen = ", ".join(f"{each.index} ({each.name})" for each in message.parameters)
    raise KeyError(f"Nothing was seen of parameter {index}. Seen were: {seen or 'none'}.")


def _matrix(message: Message, weight: int) -> Tensor:
    found = _find(message, weight).decompressed.detach()
    if found.dim() != 2:
        raise ValueError(
            f"Invalid weight: parameter {weight} has shape {list(found.shape)}. Must be the weight "
            f"[out, in] of a linear layer."
        )
    return found
