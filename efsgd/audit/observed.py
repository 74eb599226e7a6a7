"""What a message says, as an attacker reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Observed:
    """What one message says of one parameter's Δ_w = g_w + e_w, gradient and error memory.

    Attributes:
        name: of the parameter, as in errors: its own, or "group 0, parameter 1".
        index: its position among the optimizer's parameters.
        shape: of the parameter.
        kind: how it was sent: "clear", "low rank", "entries", "signs", "codes" or "triplets".
        values: what was sent, float tensors; of codes what they decode to.
        measure: the same of a candidate gradient J of that shape, differentiable: of the true Δ_w
            it gives `values`, but for rounding.
        decompressed: what every receiver makes of the message, of that shape.
    """

    name: str
    index: int
    shape: torch.Size
    kind: str
    values: tuple[Tensor, ...]
    measure: Callable[[Tensor], tuple[Tensor, ...]]
    decompressed: Tensor


@dataclass(frozen=True)
class Message:
    """All that one worker sent in one step, or the averages of what all have sent.

    Attributes:
        step: the number of the step, from 0.
        worker: who sent it; None where only the averages were seen.
        parameters: what it says of each, in the order of their indices.
        applied: whether the step was; messages of a step that was skipped or has failed have been
            seen all the same.
        nbytes: the size of the buffers that were handed over, control words included.
    """

    step: int
    worker: int | None
    parameters: tuple[Observed, ...]
    applied: bool = True
    nbytes: int = 0
