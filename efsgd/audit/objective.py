"""How far the gradient of a candidate is from what a message says."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import relu

from efsgd.audit.attacks import Attack
from efsgd.audit.observed import Message, Observed

Loss = Callable[[Tensor, Tensor], Tensor]
Bounds = tuple[float, float] | None

#: How much leaving the bounds counts for a search that cannot be kept inside them.
_OUTSIDE = 1e-2
#: By how much an entry must have its sign, in relation to the mean size of entries.
_MARGIN = 0.1
#: Tensors with less than this part of the average square count less than others.
_NEGLIGIBLE = 1e-8


class FrozenModel:
    """A model at the weights that an attacker knows; calls change nothing of it.

    `parameters` are in the order of the optimizer, and belong to the model. Buffers that a
    call updates, as BatchNorm's, are copies that are thrown away.
    """

    def __init__(self, model: nn.Module, loss: Loss, parameters: Sequence[Tensor] | None) -> None:
        self._model, self._loss = model, loss
        named = dict(model.named_parameters())
        if parameters is None:
            parameters = [each for each in named.values() if each.requires_grad]
        name_of = {id(parameter): name for name, parameter in named.items()}
        if any(id(each) not in name_of for each in parameters):
            raise ValueError(
                "Invalid parameters: not all of them are the model's. They must be those that the "
                "optimizer was given, in its order. Take them from the model that is given."
            )
        copies = {name: each.detach().clone() for name, each in named.items()}
        self.parameters = [copies[name_of[id(each)]].requires_grad_() for each in parameters]
        self._values = copies
        self._buffers = dict(model.named_buffers())

    def __call__(self, inputs: Tensor) -> Tensor:
        """The model's outputs."""
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        outputs: Tensor = functional_call(self._model, {**self._values, **buffers}, (inputs,))
        return outputs

    def gradients(
        self, inputs: Tensor, labels: Tensor, *, differentiable: bool = False
    ) -> list[Tensor]:
        """Of the loss, by parameter; zeros where it takes no part."""
        found = torch.autograd.grad(
            self._loss(self(inputs), labels),
            self.parameters,
            create_graph=differentiable,
            materialize_grads=True,
        )
        return list(found)

    def require_fits(self, message: Message) -> None:
        """Raises where a message is not of this model."""
        for seen in message.parameters:
            if seen.index >= len(self.parameters) or (
                self.parameters[seen.index].shape != seen.shape
            ):
                own = [list(each.shape) for each in self.parameters]
                raise ValueError(
                    f"Invalid message: {seen.name}, number {seen.index}, is of shape "
                    f"{list(seen.shape)}, and the model's parameters are of shapes {own}. They "
                    "must be those of the optimizer, in its order: give them as `parameters`."
                )


class Objective:
    """What a search makes small: the distance of `attack`, and terms that keep inputs plausible."""

    def __init__(
        self, message: Message, model: FrozenModel, attack: Attack, bounds: Bounds
    ) -> None:
        self._seen, self._model, self._attack, self._bounds = message, model, attack, bounds
        self._dtype = model.parameters[0].dtype
        self._aims = [each for seen in message.parameters for each in self._aims_of(seen)]
        squares = [float(each.square().sum()) for each in self._aims]
        negligible = _NEGLIGIBLE * sum(squares) / max(len(squares), 1) + 1e-30
        self._weights = [1 / (square + negligible) for square in squares]

    def __call__(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """A scalar, differentiable by both."""
        gradients = self._model.gradients(inputs, labels, differentiable=True)
        total = self._distance(gradients)
        if self._attack.total_variation and inputs.ndim == 4:
            total = total + self._attack.total_variation * _total_variation(inputs)
        if self._bounds is not None:
            outside = inputs - inputs.clamp(*self._bounds)
            total = total + _OUTSIDE * outside.square().mean()
        return total

    def _aims_of(self, seen: Observed) -> Iterator[Tensor]:
        if self._is_by_signs(seen):
            return
        values = seen.values if self._attack.adaptive else (seen.decompressed,)
        for each in values:
            yield each.detach().to(self._dtype)

    def _is_by_signs(self, seen: Observed) -> bool:
        return self._attack.adaptive and seen.kind == "signs"

    def _distance(self, gradients: Sequence[Tensor]) -> Tensor:
        found: list[Tensor] = []
        by_signs: list[Tensor] = []
        for seen in self._seen.parameters:
            gradient = gradients[seen.index]
            if self._is_by_signs(seen):
                signs = seen.decompressed.sign().to(self._dtype)
                scale = gradient.abs().mean() + torch.finfo(self._dtype).tiny
                by_signs.append(relu(_MARGIN - signs * gradient / scale).mean())
            elif self._attack.adaptive:
                found += seen.measure(gradient)
            else:
                found.append(gradient)
        total = torch.stack(by_signs).mean() if by_signs else gradients[0].new_zeros(())
        if not found:
            return total
        pairs = list(zip(found, self._aims, strict=True))
        if self._attack.distance == "cosine":
            product = torch.stack([(own * aim).sum() for own, aim in pairs]).sum()
            squares = torch.stack([torch.stack([e.square().sum() for e in p]) for p in pairs])
            lengths = (squares.sum(0) + torch.finfo(self._dtype).tiny).sqrt()
            return total + 1 - product / lengths.prod()
        errors = [
            weight * (own - aim).square().sum()
            for weight, (own, aim) in zip(self._weights, pairs, strict=True)
        ]
        return total + torch.stack(errors).mean()


def _total_variation(images: Tensor) -> Tensor:
    rows, columns = images.diff(dim=-2), images.diff(dim=-1)
    return rows.abs().mean() + columns.abs().mean()
