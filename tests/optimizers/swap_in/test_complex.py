"""B10: complex parameters are their real views, bit by bit, and SGD's to rounding.

Not to the bit: SGD multiplies complex numbers by real ones as complex products, which round
otherwise than those of their parts.
"""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd import NonFiniteGradientError, PowerSGDOptimizer
from tests.optimizers.swap_in.pairs import (
    COMBINATIONS,
    FORMS,
    IMPLEMENTATIONS,
    SHAPES,
    assert_close,
    give,
    gradients,
    pair,
    start,
    train,
)
from tests.simulation import (
    bits,
    copied,
    make_workers,
    parameters_of,
    replicated,
    snapshot,
    step_with,
)

DTYPES = [torch.complex64, torch.complex128]
MATRICES = [shape for shape in SHAPES if len(shape) >= 2]
WAYS: dict[str, dict[str, Any]] = {
    **FORMS,
    "without feedback": {**FORMS["rank 1"], "error_feedback": False},
    "cold": {**FORMS["rank 1"], "warm_start": False},
}


@pytest.mark.parametrize("form", ["off", "full rank"])
@pytest.mark.parametrize("implementation", ["default", "for-loop", "foreach"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_combination(dtype: torch.dtype, implementation: str, form: str) -> None:
    """B4, B10: SGD to rounding for every combination of its arguments."""
    for options in COMBINATIONS:
        own = {"lr": 0.05, **options, **IMPLEMENTATIONS[implementation]}
        optimizers = pair(start(dtype), FORMS[form], **own)
        train(optimizers, range(3))
        assert_close(*optimizers, options)


def as_real(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t.detach()).clone() for t in tensors]


@pytest.mark.parametrize("form", WAYS)
def test_the_real_view(form: str) -> None:
    """B10: training complex matrices is training their real views, bit by bit."""
    own = start(torch.complex64, MATRICES)
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = PowerSGDOptimizer(own, **options, **WAYS[form])
    reals = [p.requires_grad_() for p in as_real(own)]
    twin = PowerSGDOptimizer(reals, **options, **WAYS[form])
    for step in range(4):
        made = gradients(own, step)
        give(optimizer, made)
        give(twin, as_real(made))
        optimizer.step()
        twin.step()
        assert bits(as_real(own)) == bits(reals)
    for p, q in zip(own, reals, strict=True):
        state, expected = optimizer.state[p], twin.state[q]
        assert state.keys() == expected.keys()
        assert state["momentum_buffer"].dtype == torch.complex64
        assert bits(torch.view_as_real(state["momentum_buffer"])) == bits(
            expected["momentum_buffer"]
        )
        if "error" in state:
            assert state["error"].shape == q.shape
            assert bits(state["error"]) == bits(expected["error"])


def test_vectors_are_not_compressed() -> None:
    """B10: what has fewer than two dimensions of its own is sent as it is."""
    vectors = start(torch.complex64, [(), (9,), (0,)])
    optimizer = PowerSGDOptimizer(vectors, lr=0.1, momentum=0.9, rank=1, min_compression_rate=0.0)
    assert all(set(optimizer.state[p]) == {"momentum_buffer", "momentum_started"} for p in vectors)
    train([optimizer], range(2))


@pytest.mark.parametrize("form", ["off", "rank 1"])
def test_conjugated_gradients(form: str) -> None:
    """B7, B10: torch may hand over a view that is conjugated when it is read; it stays as it is."""
    optimizer, twin = (
        pair(start(torch.complex64, MATRICES), FORMS[form], lr=0.1)[0] for _ in range(2)
    )
    for p, q in zip(parameters_of(optimizer), parameters_of(twin), strict=True):
        (made,) = gradients([p], 3)
        p.grad, q.grad = made.conj(), made.conj().resolve_conj()
        assert p.grad.is_conj()
    before = [(p.grad.data_ptr(), p.grad._version) for p in parameters_of(optimizer)]
    optimizer.step()
    twin.step()
    assert bits(parameters_of(optimizer)) == bits(parameters_of(twin))
    assert [(p.grad.data_ptr(), p.grad._version) for p in parameters_of(optimizer)] == before


def test_saving_and_loading() -> None:
    """B10, D2: exactly, and training goes on."""
    options = {"lr": 0.1, "momentum": 0.9, "rank": 1, "min_compression_rate": 0.0}
    optimizer = PowerSGDOptimizer(start(torch.complex64), **options)
    train([optimizer], range(2))
    again = PowerSGDOptimizer(copied(parameters_of(optimizer)), lr=5.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert bits(snapshot([again])) == bits(snapshot([optimizer]))
    for each in (again, optimizer, copy.deepcopy(optimizer)):
        train([each], range(2, 4))
        assert bits(snapshot([each])) == bits(snapshot([again]))


def test_workers() -> None:
    """B10, H1: complex parameters of several workers stay equal, beside real ones."""
    made = [*start(torch.complex64, MATRICES), *start(torch.float32, MATRICES)]
    workers = make_workers(made, 3, lr=0.1, momentum=0.9, rank=1, min_compression_rate=0.0)
    for step in range(3):
        step_with(workers, [gradients(made, 10 * step + w) for w in range(3)])
        assert replicated(workers[0]) == replicated(workers[1]) == replicated(workers[2])


def test_nonfinite_imaginary_parts() -> None:
    """B10, B13: they are noticed."""
    optimizer = PowerSGDOptimizer(start(torch.complex64, [(4, 3)]), lr=0.1)
    p = parameters_of(optimizer)[0]
    before = bits(p)
    p.grad = torch.zeros_like(p)
    p.grad[1, 1] = complex(0.0, float("nan"))
    with pytest.raises(NonFiniteGradientError, match="parameter 0"):
        optimizer.step()
    assert bits(p) == before
