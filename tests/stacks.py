"""Stacks of matrices, and the same matrices as parameters of their own, trained side by side."""

import itertools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from efsgd import ErrorFeedbackSGD
from efsgd.compressors import Compressor
from tests.simulation import bits, parameters_of, step_with
from tests.strategies import gaussian

#: The dimensions that count matrices, and the shape of each.
Stack: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def apart(tensor: Tensor, stack: Stack) -> list[Tensor]:
    """The matrices of a tensor whose first dimensions are those that count them; views."""
    return [tensor[place] for place in itertools.product(*map(range, stack[0]))]


class Twins:
    """Workers with stacks, and as many with separate parameters; both take the same steps.

    `stacked` are the former, `separate` the latter.

    Args:
        stacks: of each parameter.
        compressor: of both.
        transposed: whether matrices lie in memory by columns, parameters' and gradients'.
        options: of `ErrorFeedbackSGD`.
    """

    def __init__(
        self,
        stacks: Sequence[Stack],
        compressor: Compressor,
        world_size: int = 2,
        *,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.stacks, self._transposed, self._seed = list(stacks), transposed, seed
        self._options = {"lr": 0.05, "compressor": compressor, **options}
        self.start = [self._made(stack, 1, i).to(dtype) for i, stack in enumerate(stacks)]
        self.stacked = [self.make() for _ in range(world_size)]
        self.separate = [self.make_separate() for _ in range(world_size)]

    def make(self) -> ErrorFeedbackSGD:
        """A fresh optimizer of stacks."""
        own = {"batch_dims": [len(counts) for counts, _ in self.stacks]}
        parameters = [start.clone().requires_grad_() for start in self.start]
        return ErrorFeedbackSGD([{"params": parameters, "per_parameter": own}], **self._options)

    def make_separate(self) -> ErrorFeedbackSGD:
        """A fresh optimizer of separate parameters."""
        pairs = zip(self.start, self.stacks, strict=True)
        parameters = [own.clone().requires_grad_() for pair in pairs for own in apart(*pair)]
        return ErrorFeedbackSGD(parameters, **self._options)

    def _made(self, stack: Stack, *seed: int) -> Tensor:
        made = gaussian((*stack[0], *stack[1]), self._seed, *seed)
        if not self._transposed or len(stack[1]) < 2:
            return made
        return made.transpose(-2, -1).contiguous().transpose(-2, -1)

    def step(
        self, step: int, missing: Callable[[int, int, int], bool] = lambda *_: False
    ) -> tuple[int, int]:
        """One step of both; returns the bytes that one worker of each has sent.

        `missing(step, worker, index)` says whether a stack has no gradient.
        """
        stacked, separate = list[list[Tensor | None]](), list[list[Tensor | None]]()
        for worker in range(len(self.stacked)):
            stacked.append([])
            separate.append([])
            for index, stack in enumerate(self.stacks):
                made = self._made(stack, 2, step, worker, index)
                gradient = None if missing(step, worker, index) else made
                stacked[-1].append(gradient)
                separate[-1] += [None if gradient is None else own for own in apart(made, stack)]
        sent = [
            sum(traced.nbytes for traced in step_with(workers, gradients))
            for workers, gradients in ((self.stacked, stacked), (self.separate, separate))
        ]
        return sent[0], sent[1]

    def assert_equal(self) -> None:
        """Parameters, and all that is kept for them, are equal to the bit."""
        for pair in zip(self.stacked, self.separate, strict=True):
            others = iter(parameters_of(pair[1]))
            for stack, parameter in zip(self.stacks, parameters_of(pair[0]), strict=True):
                matrices = list(itertools.islice(others, prod(stack[0])))
                assert bits(apart(parameter, stack)) == bits(matrices)
                states = [pair[1].state[each] for each in matrices]
                own = pair[0].state[parameter]
                for name in {*own, *(name for state in states for name in state)}:
                    kept = [state[name] for state in states]
                    if name == "momentum_started":
                        assert all(bool(each) == bool(own[name]) for each in kept)
                    else:
                        assert bits(apart(own[name], stack)) == bits(kept)
