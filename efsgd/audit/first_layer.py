"""Inputs that are read from the gradient of a linear first layer, without any search."""

import torch
from torch import Tensor

from efsgd.audit.objective import Bounds
from efsgd.audit.observed import Message


def read_first_layer(message: Message, guess: Tensor, bounds: Bounds) -> dict[str, Tensor]:
    """Inputs [samples, ...] by how they were read; none where the first layer is not linear.

    The gradient of a linear layer is a sum of outer products of what comes back to it and its
    inputs, and that of its biases is the sum of what comes back. Of a single sample the quotient is
    the input. Of several, and where there is noise, singular vectors are near to inputs; they are
    made as bright as the guess.
    """
    count, size = len(guess), guess[0].numel()
    position, first = next(
        (pair for pair in enumerate(message.parameters) if len(pair[1].shape) > 1), (0, None)
    )
    if first is None or tuple(first.shape[1:]) != (size,) or count > min(first.shape):
        return {}
    matrix = first.decompressed.to(guess.dtype)
    vectors = torch.linalg.svd(matrix, full_matrices=False).Vh[:count]
    vectors = vectors * torch.where(vectors.sum(1, keepdim=True) < 0, -1.0, 1.0)
    found = {"singular vectors": vectors * guess.flatten(1).norm(dim=1, keepdim=True)}
    biases = [each for each in message.parameters[position + 1 :] if each.shape == first.shape[:1]]
    if count == 1 and biases and bool((bias := biases[0].decompressed.to(guess.dtype)).any()):
        found["by biases"] = (bias @ matrix / bias.square().sum())[None]
    return {
        name: (inputs if bounds is None else inputs.clamp(*bounds)).view_as(guess)
        for name, inputs in found.items()
    }
