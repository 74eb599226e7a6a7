"""What is stepped: the shapes of three models, and gradients that cost nothing to make."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from efsgd.layout import matrix_shape
from efsgd.planning.tensors import gpt2_shapes
from examples.models import CifarResNet18, LSTMLanguageModel

Shape = tuple[int, ...]

WORKLOADS = {
    "resnet18": "ResNet18 for CIFAR-10",
    "lstm": "LSTM for WikiText-2",
    "gpt2": "GPT-2 small",
}


def shapes_of(workload: str) -> list[Shape]:
    """Shapes of all parameters of a model: two of the PowerSGD paper, and a transformer.

    Args:
        workload: a key of `WORKLOADS`.
    """
    if workload == "gpt2":
        return list(gpt2_shapes())
    with torch.device("meta"):
        model = (
            CifarResNet18()
            if workload == "resnet18"
            else LSTMLanguageModel(28_869, embedding=650, hidden=650, layers=3)
        )
    return [tuple(parameter.shape) for parameter in model.parameters()]


def matrices_of(shapes: Sequence[Shape], rank: int) -> list[tuple[int, int]]:
    """The matrices [n, m] that are compressed, by the rule of efsgd: where n·m > r·(n + m)."""
    matrices = [matrix_shape(shape) for shape in shapes if len(shape) > 1]
    return [(n, m) for n, m in matrices if n * m > min(n, m, rank) * (n + m)]


def message_floats(shapes: Sequence[Shape], rank: int) -> tuple[int, int]:
    """Floats in the two all-reduces of a step: vectors and P, and Q. Control words not counted.

    Args:
        shapes: of the parameters.
        rank: r.

    Example:
        >>> message_floats([(8, 10), (8,)], rank=2)
        (24, 20)
    """
    matrices = matrices_of(shapes, rank)
    vectors = sum(map(math.prod, shapes)) - sum(n * m for n, m in matrices)
    P_floats, Q_floats = (sum(min(*pair, rank) * pair[i] for pair in matrices) for i in (0, 1))
    return vectors + P_floats, Q_floats


def made_gradients(shapes: Sequence[Shape], worker: int = 0) -> list[Tensor]:
    """Standard normal float32 gradients on the CPU, others on every worker.

    Args:
        shapes: of the parameters.
        worker: number of the worker.
    """
    generator = torch.Generator().manual_seed(worker)
    return [torch.randn(shape, generator=generator) for shape in shapes]


class FixedGradients(nn.Module):
    """Parameters whose gradients are given, whatever happened to them.

    The backward pass hands over tensors that were filled beforehand, as the backward pass of a
    real model does with those that it has just computed: autograd takes them for `p.grad` without
    a copy. So forward and backward cost next to nothing, and hooks of autograd (those of
    DistributedDataParallel, too) see gradients come as usual.

    Args:
        gradients: by parameter; they stay as they are.
        accumulates: what is in `p.grad` stays there and backward adds to it.
        device: of the parameters.
    """

    def __init__(
        self,
        gradients: Sequence[Tensor],
        *,
        accumulates: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.zeros_like(g, device=device)) for g in gradients]
        )
        self.gradients, self.accumulates = gradients, accumulates
        self.ready = [torch.empty_like(g, device=device) for g in gradients]
        if accumulates:
            for weight in self.weights:
                weight.grad = torch.zeros_like(weight)
            self._spare = self.ready

    def prepare(self) -> None:
        """Fills the tensors that the next backward pass hands over. Not part of a step.

        Afterwards no parameter has a gradient, unless the module accumulates.
        """
        if self.accumulates:
            self.ready = list(self._spare)
        elif not self.ready:
            for weight in self.weights:
                assert weight.grad is not None
                self.ready.append(weight.grad)
                weight.grad = None
        for ready, gradient in zip(self.ready, self.gradients, strict=True):
            ready.copy_(gradient)

    def forward(self) -> Tensor:
        """Returns a scalar whose gradient with respect to each parameter is the given one."""
        loss: Tensor = _HandOver.apply(self, *self.weights)
        return loss


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, module: FixedGradients, *weights: Tensor) -> Tensor:
        ctx.module = module
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Nothing may refer to the tensors any more, or autograd copies them.
        ready, ctx.module.ready = ctx.module.ready, []
        return None, *ready
