"""Bytes of a worker's steps, as counted from the buffers that were handed to collectives."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd import ErrorFeedbackSGD, Signum


def bytes_of_steps(compressor: Any, gradients: Sequence[Tensor], steps: int = 1) -> list[int]:
    """The bytes that one worker sends in each of its first steps, without control words.

    Args:
        compressor: None is `Signum`, an optimizer of its own.
        gradients: of each step, one for each parameter.
        steps: how many are taken.
    """
    parameters = [torch.zeros_like(gradient, requires_grad=True) for gradient in gradients]
    make: Callable[..., Any] = Signum
    if compressor is not None:
        make = functools.partial(ErrorFeedbackSGD, compressor=compressor)
    optimizer = make(parameters, lr=0.1)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    control_words = len(parameters) + 1
    sent = []
    for _ in range(steps):
        optimizer.step()
        sent.append(optimizer.communication_stats()["bytes_sent"] - 4 * control_words)
    return sent
