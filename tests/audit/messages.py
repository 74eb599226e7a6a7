"""Messages made by hand from gradients, as the compressors of the family would make them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from efsgd.audit import Message, Observed

Measure = Callable[[Tensor], tuple[Tensor, ...]]


def seen(
    index: int, kind: str, gradient: Tensor, measure: Measure, decompressed: Tensor
) -> Observed:
    values = measure(gradient)
    return Observed(
        f"parameter {index}", index, gradient.shape, kind, values, measure, decompressed
    )


def clear(index: int, gradient: Tensor) -> Observed:
    return seen(index, "clear", gradient, lambda j: (j,), gradient)


def low_rank(index: int, gradient: Tensor, queries: Tensor) -> Observed:
    """P = D Q and D' P_hat; what has one dimension goes in clear."""
    if gradient.ndim < 2:
        return clear(index, gradient)
    matrix = gradient.flatten(1)
    basis = torch.linalg.qr(matrix @ queries).Q
    decompressed = (basis @ (basis.T @ matrix)).view_as(gradient)

    def measure(j: Tensor) -> tuple[Tensor, ...]:
        return j.flatten(1) @ queries, j.flatten(1).T @ basis

    return seen(index, "low rank", gradient, measure, decompressed)


def entries(index: int, gradient: Tensor, count: int) -> Observed:
    places = gradient.flatten().abs().topk(count).indices
    values = gradient.flatten()[places]
    decompressed = torch.zeros_like(gradient).flatten().index_copy(0, places, values)

    def measure(j: Tensor) -> tuple[Tensor, ...]:
        return (j.flatten()[places],)

    return seen(index, "entries", gradient, measure, decompressed.view_as(gradient))


def signs(index: int, gradient: Tensor) -> Observed:
    def measure(j: Tensor) -> tuple[Tensor, ...]:
        return (j.sign() * j.abs().mean(),)

    return seen(index, "signs", gradient, measure, measure(gradient)[0])


def message(parameters: Sequence[Observed], step: int = 0) -> Message:
    return Message(step, 0, tuple(parameters))


def gradients_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(cross_entropy(model(inputs), labels), list(model.parameters())))


def mlp(inputs: int = 6, hidden: int = 8, classes: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, hidden), nn.Sigmoid(), nn.Linear(hidden, classes)
    ).double()
