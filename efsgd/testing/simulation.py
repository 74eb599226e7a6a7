"""Workers in lockstep that train with made-up gradients: what a compressor is tried on."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd.compressors import Compressor
from efsgd.engine.consistency import replicated
from efsgd.engine.parameters import list_parameters
from efsgd.optimizers.error_feedback_sgd import ErrorFeedbackSGD
from efsgd.testing.gradients import Gradients
from efsgd.testing.lockstep import Traced, step_together
from efsgd.testing.violations import Violation


def make_optimizer(
    compressor: Compressor, start: Sequence[Tensor], dtype: torch.dtype, **options: Any
) -> ErrorFeedbackSGD:
    """One worker: parameters with these values, and an optimizer whose step is x - Δ'.

    Args:
        compressor: copied, as each worker has its own.
        start: the parameters' values.
        dtype: of the parameters.
        options: of `ErrorFeedbackSGD`.
    """
    own = [value.to(dtype, copy=True).requires_grad_() for value in start]
    options = {"lr": 1.0, "momentum_form": "sgd", **options}
    return ErrorFeedbackSGD(own, compressor=copy.deepcopy(compressor), **options)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_(optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None]) -> None:
    """Sets the gradients, copied in the dtype of the parameters (modified in place)."""
    for parameter, gradient in zip(parameters_of(optimizer), gradients, strict=True):
        made = None if gradient is None else gradient.to(parameter.dtype, copy=True)
        parameter.grad = made


def snapshot(optimizer: ErrorFeedbackSGD) -> dict[str, Tensor]:
    """All that a step may change on one worker, by name, copied."""
    found = {
        "the number of the step": torch.tensor(optimizer.param_groups[0]["step"], device="cpu")
    }
    for index, parameter in enumerate(parameters_of(optimizer)):
        found[f"parameter {index} of shape {list(parameter.shape)}"] = parameter.detach().clone()
        for name, value in sorted(optimizer.state[parameter].items()):
            found[f"the {name} of parameter {index} of shape {list(parameter.shape)}"] = (
                value.detach().clone()
            )
    return found


def first_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that is not bitwise equal in both; None where all are."""
    for name in [*left, *(name for name in right if name not in left)]:
        if name not in left or name not in right or not _is_same(left[name], right[name]):
            return name
    return None


def _is_same(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    pair = (each.detach().contiguous().view(-1).view(torch.uint8) for each in (left, right))
    return torch.equal(*pair)


class Simulation:
    """Some workers in one thread, all with the same compressor and the same parameters.

    Attributes:
        optimizers: of each worker.
        world_size: the number of workers.

    Args:
        compressor: each worker gets a copy.
        world_size: see above.
        start: the parameters' values.
        dtype: of the parameters.
        options: of `ErrorFeedbackSGD`.
    """

    def __init__(
        self,
        compressor: Compressor,
        world_size: int,
        start: Sequence[Tensor],
        dtype: torch.dtype,
        **options: Any,
    ) -> None:
        self.world_size, self._dtype = world_size, dtype
        self.optimizers = [
            make_optimizer(compressor, start, dtype, **options) for _ in range(world_size)
        ]

    @property
    def group(self) -> dict[str, Any]:
        """The settings of all parameters."""
        return self.optimizers[0].param_groups[0]

    @property
    def parameters(self) -> list[Tensor]:
        """Those of worker 0, detached: live views."""
        return [parameter.detach() for parameter in parameters_of(self.optimizers[0])]

    @property
    def scene(self) -> str:
        """For messages: where something is about to happen."""
        workers = "1 worker" if self.world_size == 1 else f"{self.world_size} workers"
        return f"step {self.group['step']} with {workers} in {self._dtype}"

    def errors(self, worker: int) -> list[Tensor]:
        """What one worker has yet to send; zeros where it keeps nothing."""
        optimizer = self.optimizers[worker]
        return [
            optimizer.state[p].get("error", torch.zeros_like(p)).detach()
            for p in parameters_of(optimizer)
        ]

    def replicated(self, worker: int) -> dict[str, Tensor]:
        """What one worker must have in common with all others, by name: live views."""
        optimizer = self.optimizers[worker]
        return replicated(list_parameters(optimizer.param_groups), optimizer.state)

    def snapshots(self) -> list[dict[str, Tensor]]:
        """All that a step may change, by worker."""
        return [snapshot(optimizer) for optimizer in self.optimizers]

    def step(self, gradients: Gradients) -> list[Traced]:
        """One step of all workers.

        Returns:
            The collectives of the step itself, without checks before it.

        Raises:
            Violation: it raised an error.
        """
        for optimizer, own in zip(self.optimizers, gradients, strict=True):
            give_(optimizer, own)
        return self.step_again()

    def step_again(self) -> list[Traced]:
        """One more step with the gradients that are there."""
        scene = self.scene
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "All workers have bitwise equal gradients")
                trace = step_together(self.optimizers)
        except Exception as error:
            raise Violation(
                f"{scene} raised {type(error).__name__}: {error}",
                "A step must succeed whatever the values of the gradients are, if they are finite.",
            ) from error
        number = self.optimizers[0].communication_stats()["collectives"]
        return trace[len(trace) - number :]
