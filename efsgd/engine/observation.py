"""What one worker brings to a step, shown to those who decide how far later steps compress."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.layout import real_view


@dataclass(frozen=True)
class Observation:
    """A step that all workers are about to apply. Tensors are not to be modified, nor kept.

    Attributes:
        gradients: g_w by index, in the parameters' shapes (complex ones as real views), before
            they are multiplied by `scale`; of the parameters that have one on this worker, whether
            they are compressed now or not. Sparse ones are left out.
        errors: e_w by index, float32 or float64, as they were before the step; of the parameters
            that have an error memory and take part in the step.
        scale: gradients times this are those of the loss (mixed precision), and weighted.
    """

    gradients: Mapping[int, Tensor]
    errors: Mapping[int, Tensor]
    scale: float


#: Is shown each step of an optimizer.
Watcher: TypeAlias = Callable[[Observation], None]


def observe(
    bucket: Bucket, gradients: Mapping[int, Tensor | None], absent: frozenset[int], scale: float
) -> Observation:
    """Shows the tensors of a bucket after `exchange_gradients`, before its step is committed."""
    present = {
        index: real_view(gradient)
        for index, gradient in gradients.items()
        if index not in absent and gradient is not None and gradient.layout == torch.strided
    }
    errors = {}
    if bucket.errors is not None:
        errors = {i: bucket.errors.views[i] for i in bucket.compressed - absent}
    return Observation(present, errors, scale)
