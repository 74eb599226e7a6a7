"""Inputs that are read from the gradient of a linear first layer, without any search."""

from torch import Tensor

from efsgd.audit.analytic import linear_inputs, singular_inputs
from efsgd.audit.objective import Bounds
from efsgd.audit.observed import Message


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
