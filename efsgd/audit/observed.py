"""What a message says, as an attacker reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Observed:
    """What one message says of one parameter.

    It is about Δ_w = g_w + e_w, what the worker has compressed: its gradient, times the weight and
    the inverse loss scale if there are any, and its error memory, which holds parts of earlier
    gradients. Of `Signum` it is about the worker's momentum; of a link of a pipeline about a tensor
    of activations or of their gradients, or with a memory about what is added to or taken from it.

    Attributes:
        name: of the parameter, as in errors: "parameter 0 (weight)"; of a link what travels.
        index: its position among the optimizer's parameters; of a link a running number.
        shape: of the parameter; of a complex one, of its real view.
        kind: how it was sent, which says what `values` and `measure` are. An M is a parameter
            [n, m] (or a stack [..., n, m]), J a candidate:

            * "clear": Δ itself, and J.
            * "low rank": P_w = M Q [n, r] and Q_w = Mᵀ P̂ [m, r], where Q is known to all and P̂ is
              made of the mean of all P; and J Q and Jᵀ P̂. One of the two where a step sends one, or
              has failed in between. Of `LQSGD` the factors as their codes decode.
            * "entries": elements [k] at positions that are known, and those of J.
            * "signs": +1 and -1 in the parameter's shape, and the mean magnitude [1]; and mean
              abs(J), before it tanh(J / mean abs(J)), a smooth function with the signs of J.
              `Signum` sends no magnitude.
            * "codes": Δ as it is decompressed, and J: they differ by at most half a step of the
              quantizer, or a whole one where rounding is stochastic.
            * "triplets": singular vectors u [n, s] and v [m, s], each times its weight; and the
              directions of J v and Jᵀ u, times the same. What σ was is not known.

            A parameter that is a stack of tensors, each compressed by itself, has the values of all
            one after the other.
        values: what was sent, floats.
        measure: the same of a J of that shape, differentiable: of J = Δ_w it gives `values`, but
            for rounding and what was said above.
        decompressed: what every receiver makes of the message, of that shape: a naive attacker's
            target. Zeros where a step failed too early for that.
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
        worker: who sent it; None where only the averages were seen. Of a pipeline the stage.
        parameters: what it says of each, in the order of their indices; of a step that failed
            early, of those that had been sent.
        applied: whether the step was; messages of a step that was skipped or has failed have been
            seen all the same. Of a link it is not known, and True.
        nbytes: the size of the buffers that were handed over, control words included.
    """

    step: int
    worker: int | None
    parameters: tuple[Observed, ...]
    applied: bool = True
    nbytes: int = 0

    def parameter(self, index: int) -> Observed:
        """What it says of one parameter.

        Args:
            index: the parameter's, as in `Observed.index`.

        Raises:
            KeyError: nothing was seen of the parameter.
        """
        for each in self.parameters:
            if each.index == index:
                return each
        seen = ", ".join(f"{each.index} ({each.name})" for each in self.parameters)
        raise KeyError(f"Nothing was seen of parameter {index}. Seen were: {seen or 'none'}.")
