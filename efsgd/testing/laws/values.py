"""Laws of what a step does to parameters and errors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from efsgd.engine.parameters import compute_dtype
from efsgd.testing.gradients import KINDS, Gradients
from efsgd.testing.simulation import Simulation, first_difference, parameters_of
from efsgd.testing.trial import Trial, law
from efsgd.testing.violations import Violation

# What is lost to rounding in float64: 2e-16 for each of some dozen sums.
TOLERANCE = 1e-10


@law
def keeps_shapes_and_dtypes(trial: Trial) -> None:
    """Parameters, errors and gradients keep their shapes and dtypes, and gradients their values.

    For parameters in float64, float32 and bfloat16. Errors are float64 for the first and float32
    for both others. A step changes neither `p.grad` nor which tensor it is.
    """
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        workers = trial.simulate(trial.several, dtype)
        for step in range(2):
            scene = workers.scene
            own = trial.gradients(trial.several, step)
            workers.step(own)
            for worker, optimizer in enumerate(workers.optimizers):
                pairs = zip(parameters_of(optimizer), trial.shapes, own[worker], strict=True)
                for index, (parameter, shape, gradient) in enumerate(pairs):
                    where = f"after {scene}, on worker {worker}, parameter {index} of {list(shape)}"
                    error = optimizer.state[parameter].get("error", parameter).detach()
                    is_same = (
                        parameter.shape == torch.Size(shape) == error.shape
                        and parameter.dtype == dtype
                        and error.dtype in (compute_dtype(parameter), parameter.dtype)
                    )
                    if not is_same:
                        raise Violation(
                            f"{where} has shape {list(parameter.shape)} and {parameter.dtype}, its "
                            f"error {list(error.shape)} and {error.dtype}",
                            "Neither may be replaced.",
                        )
                    assert parameter.grad is not None and gradient is not None
                    if not torch.equal(parameter.grad, gradient.to(dtype)):
                        raise Violation(f"{where} has another gradient", "It must not be modified.")


@law
def knows_the_norm(trial: Trial) -> None:
    """`squared_norms` are those of what is decompressed, so that `max_grad_norm` clips to it.

    To 1e-9 in float64, with gradients that all workers lack.
    """
    workers = trial.simulate(trial.several, max_grad_norm=1e30)
    for step in range(trial.steps):
        scene = workers.scene
        for optimizer in workers.optimizers:
            for parameter in parameters_of(optimizer):
                parameter.detach().zero_()
        workers.step(trial.gradients(trial.several, step, with_missing=True))
        norm = float(torch.cat([update.flatten() for update in workers.parameters]).norm())
        reported = workers.optimizers[0].communication_stats()["grad_norm"]
        if not abs(reported - norm) <= 1e-9 * norm:
            raise Violation(
                f"in {scene} squared_norms give a norm of {reported:.9g}, and the updates have "
                f"{norm:.9g}",
                "They must be the sums of squares of the decompressed tensors that are wanted.",
            )


@law
def survives_zeros(trial: Trial) -> None:
    """Where all gradients are zero nothing moves and nothing is NaN, and learning goes on after it.

    From zeros alone come zeros, as parameters' updates and as errors. A parameter that then has
    the same gradients again and again, all others none but zeros, moves within 50 steps.
    """
    for world_size in trial.fewest_and_most:
        workers = trial.simulate(world_size, torch.float32, start=1.0)
        rest = trial.gradients(world_size, 0, kinds=["zero"])
        for _ in range(2):
            scene = workers.scene
            workers.step(rest)
            _require_rest(workers, trial.shapes, scene)
        awake = trial.gradients(world_size, 0, kinds=["gaussian"])
        for index, parameter in enumerate(workers.parameters):
            own = [list(gradients) for gradients in rest]
            for worker, gradients in enumerate(own):
                gradients[index] = awake[worker][index]
            for _ in range(50 if parameter.numel() else 0):
                workers.step(own)
                if bool((parameter != 1.0).any()):
                    break
            if parameter.numel() and bool((parameter == 1.0).all()):
                raise Violation(
                    f"with {world_size} workers parameter {index} of shape "
                    f"{list(parameter.shape)} never moves again after two steps of zeros",
                    "State that a zero gradient can bring to zero must find a way back.",
                )


def _require_rest(workers: Simulation, shapes: Sequence[Sequence[int]], scene: str) -> None:
    for worker in range(workers.world_size):
        values = zip(parameters_of(workers.optimizers[worker]), workers.errors(worker), strict=True)
        for index, (parameter, error) in enumerate(values):
            if not bool((parameter == 1.0).all()) or not bool((error == 0.0).all()):
                what = "an update" if not bool((parameter == 1.0).all()) else "an error"
                raise Violation(
                    f"{scene}, of zero gradients, gives parameter {index} of shape "
                    f"{list(shapes[index])} {what} that is not zero, on worker {worker}",
                    "A tensor of zeros must be sent as zeros: look for a division by its norm.",
                )


@law
def survives_scales(trial: Trial) -> None:
    """Gradients of size 1e-30 and 1e+30, in float32, give updates and errors that are finite."""
    for scales in [(1e-30,), (1e30,), (1e30, 1e-30)]:
        for world_size in trial.fewest_and_most:
            workers = trial.simulate(world_size, torch.float32)
            for step in range(trial.steps):
                scale, scene = scales[step % len(scales)], workers.scene
                kinds = ["gaussian", "one_hot", "constant"]
                workers.step(trial.gradients(world_size, step, kinds=kinds, scale=scale))
                for worker in range(world_size):
                    pairs = zip(workers.parameters, workers.errors(worker), strict=True)
                    for index, (parameter, error) in enumerate(pairs):
                        if not bool((parameter.isfinite() & error.isfinite()).all()):
                            raise Violation(
                                f"{scene}, of gradients times {scale:g}, leaves parameter {index} "
                                f"of shape {list(parameter.shape)}, or its error on worker "
                                f"{worker}, with values that are not finite",
                                "Divide by the largest magnitude before squaring or summing, and "
                                "by nothing that may be zero.",
                            )


@law
def keeps_workers_equal(trial: Trial) -> None:
    """After each step all workers have the bitwise same parameters and state, errors apart.

    In float32, with gradients that some or all workers lack.
    """
    for world_size in trial.world_sizes:
        workers = trial.simulate(world_size, torch.float32)
        for step in range(trial.steps):
            scene = workers.scene
            workers.step(trial.gradients(world_size, step, with_missing=True))
            first = workers.replicated(0)
            for worker in range(1, world_size):
                name = first_difference(first, workers.replicated(worker))
                if name is not None:
                    raise Violation(
                        f"after {scene}, {name} of worker {worker} is not bitwise that of worker 0",
                        "What is decompressed must depend on what was received alone, not on "
                        "the worker, nor on its own numbers.",
                    )


@law
def loses_nothing(trial: Trial) -> None:
    """All updates and the mean of the workers' errors add up to the mean of all gradients.

    After each step, to 1e-10 of the largest of them, in float64; with gradients that some or all
    workers lack, after a step of zeros alone, and through the step at which compression starts.
    With error feedback only.
    """
    if not trial.error_feedback:
        return
    for world_size in trial.world_sizes:
        for start in (0, 2):
            workers = trial.simulate(world_size, start_compressing_at=start)
            balance = _Balance(workers)
            for step in range(max(trial.steps, start + 2)):
                kinds = ["zero"] if step == 1 else KINDS
                own = trial.gradients(world_size, step, kinds=kinds, with_missing=True)
                balance.step(own)


class _Balance:
    """Books what goes into workers with lr 1, in float64, and what comes out."""

    def __init__(self, workers: Simulation) -> None:
        self._workers = workers
        self._start = [parameter.clone() for parameter in workers.parameters]
        self._received = [torch.zeros_like(parameter) for parameter in workers.parameters]
        self._largest = [0.0] * len(self._start)

    def step(self, own: Gradients) -> None:
        """One step, after which nothing may be lost."""
        workers = self._workers
        scene = workers.scene
        workers.step(own)
        columns: list[tuple[Tensor | None, ...]] = list(zip(*own, strict=True))
        errors = list(zip(*map(workers.errors, range(workers.world_size)), strict=True))
        for index, parameter in enumerate(workers.parameters):
            for gradient in columns[index]:
                if gradient is not None:
                    self._received[index] += gradient / workers.world_size
            error = torch.stack(errors[index]).mean(0)
            applied = self._start[index] - parameter
            lost = _largest(self._received[index] - applied - error)
            for each in (applied, error, *errors[index], self._received[index]):
                self._largest[index] = max(self._largest[index], _largest(each))
            if not lost <= TOLERANCE * self._largest[index]:
                raise Violation(
                    f"after {scene}, updates and errors of parameter {index} of shape "
                    f"{list(parameter.shape)} differ from its gradients by {lost:.3g}, beside "
                    f"values up to {self._largest[index]:.3g}",
                    "What a worker subtracts for what it has sent must be what all workers add "
                    "for it; with `averages`, what the mean of payloads stands for must be the "
                    "mean of what each stands for.",
                )


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
