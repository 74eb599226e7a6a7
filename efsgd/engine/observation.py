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


def observe(bucket: Bucket, absent: frozenset[int], scale: float) -> Observation:
    """Shows the tensors of a bucket, before its step is committed.

    Args:
        bucket: after `exchange_gradients`.
        absent: parameters that no worker had a gradient for.
        scale: the gradients were multiplied by it.
    """
    gradients = {
        index: real_view(gradient)
        for index, parameter in bucket.parameters.items()
        if index not in absent
        and (gradient := parameter.grad) is not None
        and gradient.layout == torch.strided
    }
    present = bucket.compressed - absent
    errors = {} if bucket.errors is None else {i: bucket.errors.views[i] for i in present}
    return Observation(gradients, errors, scale)
