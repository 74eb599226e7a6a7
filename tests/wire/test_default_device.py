"""torch.set_default_device and torch.set_default_dtype make no difference to what is computed."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd import ErrorFeedbackSGD
from efsgd.algorithms.quantization import log_quantizer
from efsgd.optimizers.signum import Signum
from efsgd.testing.gradients import made_up
from efsgd.wire import bits
from tests.compressors.test_contract_suite import EVERY_COMPRESSOR
from tests.simulation import bits as bits_of
from tests.simulation import parameters_of, step_with

SHAPES = [(30, 20), (20,), (), (8, 6, 3), (70, 60)]
STEPS = 4  # PowerSGD+ refreshes twice in them
OPTIMIZERS: list[Any] = [*EVERY_COMPRESSOR, Signum]


@pytest.fixture(autouse=True)
def _defaults_are_restored() -> Iterator[None]:
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(dtype)
    forget_tables()


def forget_tables() -> None:
    """What is made once in a process must be made under the defaults that are looked at."""
    bits._spread_bytes.cache_clear()
    log_quantizer._table.cache_clear()


def tensors_of(worker: int, *path: int) -> list[Tensor]:
    made = [made_up("gaussian", shape, worker, *path, i) for i, shape in enumerate(SHAPES)]
    return [each.to("cpu", torch.float32) for each in made]


def a_run(kind: Any) -> Any:
    """Some steps of two workers: all their parameters and state, bit by bit."""
    forget_tables()
    workers: list[Any] = []
    for _ in range(2):
        own = [each.requires_grad_() for each in tensors_of(0, 0)]
        if kind is Signum:
            workers.append(Signum(own, lr=0.1))
        else:
            # Without it Spectral Atomo's errors grow.
            feedback = type(kind).__name__ != "SpectralAtomo"
            options: dict[str, Any] = {"compressor": kind, "error_feedback": feedback}
            workers.append(ErrorFeedbackSGD(own, lr=0.1, **options))
    for step in range(STEPS):
        step_with(workers, [tensors_of(worker, 1, step) for worker in range(2)])
    states = [[worker.state[p] for p in parameters_of(worker)] for worker in workers]
    return bits_of([[parameters_of(worker) for worker in workers], states])


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=repr)
def test_the_default_device_and_dtype_make_no_difference(kind: Any) -> None:
    expected = a_run(kind)
    torch.set_default_device("meta")
    assert a_run(kind) == expected
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float64)
    assert a_run(kind) == expected
