"""What messages give away without any search: inputs that algebra reads off a linear layer's.

Of a linear layer y = W x + b the gradients of one record are dW = δ xᵀ and db = δ, where δ is the
gradient of y. So every row of dW is x times a number that db has, and P̂Qᵀ of rank 1 is dW itself.
"""

import torch
from torch import Tensor

from efsgd.audit.objective import Bounds
from efsgd.audit.observed import Message
from efsgd.checks import plain, require_integer


def linear_inputs(message: Message, weight: int, bias: int | None = None) -> Tensor:
    """The input of a linear layer, from what was sent of its gradients for one record.

    With the bias it is the weight's gradient over the bias's, by least squares over the elements
    that were sent: exact where both were sent in clear, where the weight was sent at any rank and
    by however many workers, since the gradient of one record has rank 1, and where of each column
    any element was sent whose bias was sent as well. Without, it is the direction of the input: the
    leading right singular vector, which of rank 1 is Q. For several records it is a weighted sum of
    their inputs.

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
    rows, divisors = _matrix(message, weight), message.parameter(bias).decompressed.detach()
    if divisors.shape != rows.shape[:1]:
        raise ValueError(
            f"Invalid bias: parameter {bias} has shape {list(divisors.shape)}. Must be the bias "
            f"[{len(rows)}] of the weight {list(rows.shape)}."
        )
    if message.parameter(weight).kind == "low rank":
        # P̂ is of all workers' mean: P̂P̂ᵀδxᵀ is received, whose columns show P̂P̂ᵀδ but for its length.
        left = torch.linalg.svd(rows, full_matrices=False).U[:, 0]
        divisors = left * (left @ divisors)
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


def singular_inputs(message: Message, weight: int, count: int = 1) -> Tensor:
    """Directions of inputs of a linear layer: leading right singular vectors of what was sent.

    The gradient of the weight is Σ δ xᵀ over the records. Noise that was added to each of its
    elements hardly turns the leading vector as long as the singular value is above that of the
    noise, √out + √in times its standard deviation. It needs neither the length of the gradient,
    which clipping changes, nor a search.

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


def read_first_layer(message: Message, guess: Tensor, bounds: Bounds) -> dict[str, Tensor]:
    """Inputs [samples, ...] by how they were read; none where the first layer is not linear.

    Singular vectors say nothing of brightness: they are made as bright as the guess.
    """
    count, size = len(guess), guess[0].numel()
    first = next((seen for seen in message.parameters if len(seen.shape) > 1), None)
    if first is None or tuple(first.shape[1:]) != (size,) or count > min(first.shape):
        return {}
    vectors = singular_inputs(message, first.index, count)
    found = {"singular vectors": vectors * guess.flatten(1).norm(dim=1, keepdim=True)}
    for seen in message.parameters:
        is_bias = seen.shape == first.shape[:1] and bool(seen.decompressed.any())
        if count == 1 and is_bias and "by biases" not in found:
            found["by biases"] = linear_inputs(message, first.index, seen.index)[None]
    return {
        name: (inputs if bounds is None else inputs.clamp(*bounds)).view_as(guess).to(guess.dtype)
        for name, inputs in found.items()
    }


def _matrix(message: Message, weight: int) -> Tensor:
    found = message.parameter(weight).decompressed.detach()
    if found.dim() != 2:
        raise ValueError(
            f"Invalid weight: parameter {weight} has shape {list(found.shape)}. Must be the weight "
            f"[out, in] of a linear layer."
        )
    return found
