"""Laws of what a step does to parameters and errors."""

from collections.abc import Iterator

import torch
from torch import Tensor

from efsgd.testing.gradients import KINDS
from efsgd.testing.simulation import Simulation, largest, require_equal
from efsgd.testing.trial import Trial, law
from efsgd.testing.violations import Violation

# What is lost to rounding in float64: 2e-16 for each of some dozen sums.
TOLERANCE = 1e-10


@law("A step must replace neither parameters nor errors, and must not modify gradients.")
def keeps_shapes_and_dtypes(trial: Trial) -> None:
    """Parameters, errors and gradients keep their shapes and dtypes, and gradients their values.

    For parameters in float64, float32 and bfloat16. Errors are float64 for the first and float32
    for both others. A step changes neither `p.grad` nor which tensor it is.
    """
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        workers = trial.simulate(trial.several, dtype)
        dtype_of_errors = torch.float64 if dtype == torch.float64 else torch.float32
        for step in range(2):
            scene, given, _ = workers.take(step)
            for worker, index, parameter, error, what in _tensors(workers):
                shape = torch.Size(trial.shapes[index])
                is_same = parameter.shape == shape == error.shape and parameter.dtype == dtype
                if not is_same or error.dtype not in (dtype_of_errors, dtype):
                    raise Violation(
                        f"after {scene}, {what} has {list(parameter.shape)} {parameter.dtype}, "
                        f"its error {list(error.shape)} {error.dtype}"
                    )
                gradient = given[worker][index]
                assert parameter.grad is not None and gradient is not None
                if not torch.equal(parameter.grad, gradient.to(dtype)):
                    raise Violation(f"after {scene}, {what} has another gradient")


@law("squared_norms must be sums of squares of the decompressed tensors that are wanted.")
def knows_the_norm(trial: Trial) -> None:
    """`squared_norms` are those of what is decompressed, so that `max_grad_norm` clips to it.

    To 1e-9 in float64, with gradients that all workers lack.
    """
    workers = trial.simulate(trial.several, max_grad_norm=1e30)
    for step in range(trial.steps):
        for *_, parameter, _, _ in _tensors(workers):
            parameter.detach().zero_()
        scene, *_ = workers.take(step, with_missing=True)
        norm = float(torch.cat([update.flatten() for update in workers.parameters]).norm())
        reported = workers.optimizers[0].communication_stats()["grad_norm"]
        if not abs(reported - norm) <= 1e-9 * norm:
            raise Violation(f"{scene} reports a norm of {reported:.9g}, updates have {norm:.9g}")


@law(
    "A tensor of zeros must be sent as zeros: look for a division by its norm. State that a zero "
    "gradient can bring to zero must find a way back."
)
def survives_zeros(trial: Trial) -> None:
    """Where all gradients are zero nothing moves, nothing is NaN, and learning resumes afterwards.

    From zeros alone come zeros, as parameters' updates and as errors. A parameter that then has
    the same gradients again and again, all others none but zeros, moves within 50 steps.
    """
    for world_size in trial.fewest_and_most:
        workers = trial.simulate(world_size, torch.float32, start=1.0)
        for _ in range(2):
            scene, rest, _ = workers.take(0, kinds=["zero"])
            for *_, parameter, error, what in _tensors(workers):
                if bool((parameter != 1.0).any()) or bool((error != 0.0).any()):
                    raise Violation(f"{scene}, of zero gradients, gives {what} an update or error")
        awake = workers.gradients(0, kinds=["gaussian"])
        for index, parameter in enumerate(workers.parameters):
            if parameter.numel() == 0:
                continue
            mixed = [list(own) for own in rest]
            for own, gradients in zip(mixed, awake, strict=True):
                own[index] = gradients[index]
            for _ in range(50):
                workers.step(mixed)
                if bool((parameter != 1.0).any()):
                    break
            if bool((parameter == 1.0).all()):
                raise Violation(
                    f"with {world_size} workers parameter {index} of shape "
                    f"{list(parameter.shape)} never moves again after two steps of zeros"
                )


@law("Divide by the largest magnitude before squaring or summing, and by nothing that may be zero.")
def survives_scales(trial: Trial) -> None:
    """Gradients of size 1e-30 and 1e+30, in float32, give updates and errors that are finite."""
    kinds = ["gaussian", "one_hot", "constant"]
    for scales in [(1e-30,), (1e30,), (1e30, 1e-30)]:
        for world_size in trial.fewest_and_most:
            workers = trial.simulate(world_size, torch.float32)
            for step in range(trial.steps):
                scale = scales[step % len(scales)]
                scene, *_ = workers.take(step, kinds=kinds, scale=scale)
                for *_, parameter, error, what in _tensors(workers):
                    if not bool((parameter.isfinite() & error.isfinite()).all()):
                        raise Violation(
                            f"{scene}, of gradients times {scale:g}, leaves {what}, or its error, "
                            f"with values that are not finite"
                        )


@law(
    "What is decompressed must depend on what was received alone, not on the worker, nor on its "
    "own numbers."
)
def keeps_workers_equal(trial: Trial) -> None:
    """After each step all workers have the bitwise same parameters and state, errors apart.

    In float32, with gradients that some or all workers lack.
    """
    for world_size in trial.world_sizes:
        workers = trial.simulate(world_size, torch.float32)
        for step in range(trial.steps):
            scene, *_ = workers.take(step, with_missing=True)
            found = [workers.snapshot(worker, local=False) for worker in range(world_size)]
            require_equal(found, found[:1] * world_size, f"after {scene}, compared with worker 0")


@law(
    "What a worker subtracts for what it has sent must be what all workers add for it; with "
    "`averages`, what the mean of payloads decompresses to must be the mean of what each "
    "decompresses to."
)
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
            received = [torch.zeros_like(parameter) for parameter in workers.parameters]
            greatest = [0.0] * len(received)
            for step in range(max(trial.steps, start + 2)):
                kinds = ["zero"] if step == 1 else KINDS
                scene, given, _ = workers.take(step, kinds=kinds, with_missing=True)
                every_error = zip(*map(workers.errors, range(world_size)), strict=True)
                for index, errors in enumerate(every_error):
                    for gradient in (own[index] for own in given):
                        if gradient is not None:
                            received[index] += gradient / world_size
                    applied, error = -workers.parameters[index], torch.stack(errors).mean(0)
                    lost = largest(received[index] - applied - error)
                    sizes = map(largest, (applied, error, *errors, received[index]))
                    greatest[index] = max(greatest[index], *sizes)
                    if not lost <= TOLERANCE * greatest[index]:
                        raise Violation(
                            f"after {scene}, updates and errors of parameter {index} of shape "
                            f"{list(applied.shape)} differ from its gradients by {lost:.3g}, "
                            f"with values up to {greatest[index]:.3g}"
                        )


def _tensors(workers: Simulation) -> Iterator[tuple[int, int, Tensor, Tensor, str]]:
    """Each parameter of each worker: whose it is, its place, itself, its error, and its name."""
    for worker in range(workers.world_size):
        pairs = zip(workers.parameters_of(worker), workers.errors(worker), strict=True)
        for index, (parameter, error) in enumerate(pairs):
            what = f"parameter {index} of shape {list(workers.shapes[index])} on worker {worker}"
            yield worker, index, parameter, error, what
