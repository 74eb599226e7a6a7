"""Other ways to take the same step: in modes of the calling thread, and with gradient scalers."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from efsgd import PowerSGDOptimizer
from efsgd.testing import lockstep


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    """Another default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


#: Each makes a context.
MODES: list[Callable[[], Any]] = [
    torch.inference_mode,
    torch.no_grad,
    lambda: torch.autocast("cpu", torch.bfloat16),
    default_dtype,
    lambda: torch.device("meta"),
]


def step_scaled(
    optimizers: Sequence[PowerSGDOptimizer], overflows: int | None, *, unscales: bool
) -> None:
    """A step of each worker's own `GradScaler`, with losses multiplied by four.

    A gradient of worker `overflows` is infinite.
    """
    exchanges: list[Any] = []
    for worker, optimizer in enumerate(optimizers):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))  # which makes it ready
        given = [p for group in optimizer.param_groups for p in group["params"]]
        trained = [p for p in given if p.requires_grad]
        if trained and overflows is not None and worker == overflows % len(optimizers):
            trained[0].grad = torch.full_like(trained[0], torch.inf)
        for parameter in given:
            if parameter.grad is not None:
                parameter.grad = parameter.grad * 4.0

        def step(optimizer: PowerSGDOptimizer = optimizer, worker: int = worker) -> None:
            exchanges.append(optimizer.exchange(len(optimizers), worker))

        if all(parameter.grad is None for parameter in given):  # the scaler refuses to step
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
            step()
            del optimizer.grad_scale, optimizer.found_inf
            continue
        if unscales:
            scaler.unscale_(optimizer)
        optimizer.step = step  # of this worker alone
        try:
            scaler.step(optimizer)
        finally:
            del optimizer.step
    lockstep(exchanges)
