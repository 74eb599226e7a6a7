"""What one worker brings to a step and sends: who makes it, and who is shown it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.error_feedback import Outcome
from efsgd.engine.plan import Plan
from efsgd.layout import real_view
from efsgd.wire.collectives import Exchange


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

#: Is given the exchange of one bucket in a step of this number, and returns the same one, watched:
#: what it asks for must stay what it is. All that a step sends of gradients passes here.
Listener: TypeAlias = Callable[[Plan, Bucket, int, Exchange[Outcome]], Exchange[Outcome]]


class Preparation(Protocol):
    """Makes the gradients of a step, as part of it: no step of the optimizer is without it.

    What it raises is told to the other workers, like all that keeps a worker from taking part.
    """

    def prepare(self, world_size: int, worker: int) -> None:
        """Sets `p.grad` of this worker, before anything reads it."""

    def agree(self, world_size: int, worker: int) -> Exchange[None]:
        """What workers tell each other where they compare what they train."""


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


def show(
    watchers: Sequence[Watcher], plan: Plan, outcomes: Sequence[Outcome], scale: float
) -> Exception | None:
    """Shows a step to those who watch.

    Returns:
        What one of them has raised. The other workers apply the step, so this one does, too.
    """
    try:
        for bucket, outcome in zip(plan.buckets, outcomes, strict=True):
            gradients = plan.gradients(bucket)
            for watcher in watchers:
                watcher(observe(bucket, gradients, outcome.verdict.absent, scale))
    except Exception as error:
        return error
    return None
