"""Workers in lockstep that train with made-up gradients: what a compressor is tried on."""

import copy
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from efsgd.compressors import Compressor
from efsgd.engine.state import local_state
from efsgd.optimizers.error_feedback_sgd import ErrorFeedbackSGD
from efsgd.testing.gradients import Gradients, gradients
from efsgd.testing.violations import Violation
from efsgd.wire.lockstep import Traced, step_together

#: All that a step may change on one worker, by name, copied.
Snapshot: TypeAlias = dict[str, Tensor]


class Simulation:
    """Workers in one thread with the same parameters, and optimizers whose step is x - Δ'.

    `seed` is of the gradients, `start` all values of all parameters; `options` are those of
    `ErrorFeedbackSGD`.
    """

    def __init__(
        self,
        compressor: Compressor,
        world_size: int,
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype = torch.float64,
        *,
        seed: int = 0,
        start: float = 0.0,
        **options: Any,
    ) -> None:
        self.world_size, self.shapes, self._dtype, self._seed = world_size, shapes, dtype, seed
        options = {"lr": 1.0, "momentum_form": "sgd", **options}
        values = [torch.full(torch.Size(s), start, dtype=dtype, device="cpu") for s in shapes]
        self.optimizers = [
            ErrorFeedbackSGD(
                [value.clone().requires_grad_() for value in values],
                compressor=copy.deepcopy(compressor),
                **options,
            )
            for _ in range(world_size)
        ]

    @property
    def group(self) -> dict[str, Any]:
        """The settings of all parameters."""
        return self.optimizers[0].param_groups[0]

    @property
    def parameters(self) -> list[Tensor]:
        """Those of worker 0, detached: live views."""
        return [parameter.detach() for parameter in self.parameters_of(0)]

    @property
    def scene(self) -> str:
        """For messages: where something is about to happen."""
        workers = "1 worker" if self.world_size == 1 else f"{self.world_size} workers"
        return f"step {self.group['step']} with {workers} in {self._dtype}"

    def parameters_of(self, worker: int) -> list[Tensor]:
        """All parameters of one worker, in order."""
        return list(self.optimizers[worker].param_groups[0]["params"])

    def errors(self, worker: int) -> list[Tensor]:
        """What one worker has yet to send; zeros where it keeps nothing."""
        state = self.optimizers[worker].state
        parameters = self.parameters_of(worker)
        return [state[p].get("error", torch.zeros_like(p)).detach() for p in parameters]

    def snapshot(self, worker: int, *, local: bool = True) -> Snapshot:
        """All that a step may change on one worker, or of it what all workers have in common."""
        step = torch.tensor(self.optimizers[worker].param_groups[0]["step"], device="cpu")
        found = {"the number of the step": step}
        for index, parameter in enumerate(self.parameters_of(worker)):
            name = f"parameter {index} of shape {list(parameter.shape)}"
            found[name] = parameter.detach().clone()
            for kind, value in sorted(self.optimizers[worker].state[parameter].items()):
                if local or kind not in local_state(self.optimizers[worker].compressor):
                    found[f"the {kind} of {name}"] = value.detach().clone()
        return found

    def snapshots(self) -> list[Snapshot]:
        """All that a step may change, by worker."""
        return [self.snapshot(worker) for worker in range(self.world_size)]

    def gradients(self, step: int, **options: Any) -> Gradients:
        """Those of one step; see `efsgd.testing.gradients.gradients`."""
        return gradients(self.shapes, self.world_size, step, self._seed, **options)

    def give_(self, made: Gradients) -> None:
        """Sets the gradients, copied in the dtype of the parameters (modified in place)."""
        for worker, own in enumerate(made):
            for parameter, gradient in zip(self.parameters_of(worker), own, strict=True):
                parameter.grad = None if gradient is None else gradient.to(self._dtype, copy=True)

    def take(self, step: int, **options: Any) -> tuple[str, Gradients, list[Traced]]:
        """One step with made-up gradients: where it was, with which, and by which collectives."""
        scene, made = self.scene, self.gradients(step, **options)
        return scene, made, self.step(made)

    def step(self, made: Gradients) -> list[Traced]:
        """One step of all workers: its collectives, without checks before it."""
        self.give_(made)
        scene = self.scene
        try:
            with warnings.catch_warnings():
                for expected in ("All workers have bitwise equal gradients", "Compression saves"):
                    warnings.filterwarnings("ignore", expected)
                trace = step_together(self.optimizers)
        except Exception as error:
            raise Violation(
                f"{scene} raised {type(error).__name__}: {error}",
                "A step with finite gradients must succeed, whatever their values.",
            ) from error
        number = self.optimizers[0].communication_stats()["collectives"]
        return trace[len(trace) - number :]


def largest(tensor: Tensor) -> float:
    """The largest magnitude; 0 of an empty tensor."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def first_difference(left: Snapshot, right: Snapshot, tolerance: float = 0.0) -> str | None:
    """The name of the first tensor that is not bitwise equal in both; None where all are.

    With a tolerance: equal up to that, relative to its largest element or 1.
    """
    for name in {**left, **right}:
        if name not in left or name not in right:
            return name
        a, b = left[name].contiguous(), right[name].contiguous()
        if a.shape != b.shape or a.dtype != b.dtype:
            return name
        if tolerance:
            limit = tolerance * max(1.0, largest(b.double()))
            is_same = largest(a.double() - b.double()) <= limit
        else:
            is_same = torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
        if not is_same:
            return name
    return None


def require_equal(found: Sequence[Snapshot], expected: Sequence[Snapshot], when: str) -> None:
    """Raises a `Violation` unless each worker has to the bit what is expected."""
    for worker, (own, other) in enumerate(zip(found, expected, strict=True)):
        name = first_difference(own, other)
        if name is not None:
            raise Violation(f"{when}, {name} differs on worker {worker} of {len(found)}")
