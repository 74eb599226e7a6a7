"""G1, G2, G5: foreach, fused and maximize. G3: test_differentiable.py; G4: test_sparse.py."""

import itertools

import pytest
import torch
from torch.optim import SGD

from efsgd import PowerSGDOptimizer
from tests.algorithms.test_chunks import changes_of
from tests.optimizers.swap_in.pairs import (
    FORMS,
    IMPLEMENTATIONS,
    ROUNDING,
    UNCOMPRESSED,
    give,
    gradients,
    pair,
    start,
    train,
)
from tests.simulation import bits, difference, parameters_of


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_implementations_agree(form: str, dtype: torch.dtype) -> None:
    """G1, G2: the for-loop's numbers and keys; by default bit by bit, otherwise to rounding."""
    ends = {}
    for name, flags in IMPLEMENTATIONS.items():
        if form == "paper" and name == "fused":
            continue
        options = {"momentum": 0.9, "weight_decay": 0.1, **flags}
        optimizer, _ = pair(start(dtype), FORMS[form], lr=0.1, **options)
        train([optimizer], range(5))
        ends[name] = optimizer
    expected = ends["for-loop"]
    for optimizer in ends.values():
        for p, q in zip(parameters_of(optimizer), parameters_of(expected), strict=True):
            assert difference(p, q) < ROUNDING[dtype]
            assert optimizer.state[p].keys() == expected.state[q].keys()
    assert bits(parameters_of(ends["default"])) == bits(parameters_of(expected))


def peak(optimizer: torch.optim.Optimizer) -> int:
    """The most memory, in bytes, that a step has at once beyond what there was before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        optimizer.step()
    return max(itertools.accumulate(changes_of(profile)))


@pytest.mark.parametrize("form", ["off", "full rank", "rank 1"])
def test_memory_of_foreach(form: str) -> None:
    """G1: at most one copy of the gradients more than the for-loop."""
    peaks = {}
    for foreach in (False, True):
        optimizer, _ = pair(
            start(shapes=[(64, 48)] * 6), FORMS[form], lr=0.1, momentum=0.9, foreach=foreach
        )
        train([optimizer], range(2))
        peaks[foreach] = peak(optimizer)
    copy_of_gradients = 6 * 64 * 48 * 4
    assert peaks[False] > 0
    assert peaks[True] <= peaks[False] + copy_of_gradients


def test_fused_with_late_gradients() -> None:
    """G2: parameters whose first gradient comes late have their first momentum then."""
    late, ends = {(0, 4), (1, 4), (2, 5)}, []
    for flags in ({"fused": True}, {}):
        optimizer, _ = pair(start(), FORMS["rank 1"], lr=0.1, momentum=0.9, **flags)
        for step in range(5):
            made = enumerate(gradients(parameters_of(optimizer), step))
            give(optimizer, [None if (step, i) in late else gradient for i, gradient in made])
            optimizer.step()
        ends.append(parameters_of(optimizer))
    for a, b in zip(*ends, strict=True):
        assert difference(a, b) < 1e-6  # the fused kernel multiplies and adds in one rounding


def test_fused_without_data() -> None:
    """G2: on the meta device an error that begins as torch's, as soon as a step is taken."""
    for optimizer in pair([torch.zeros(4, 3, device="meta")], UNCOMPRESSED, lr=0.1, fused=True):
        p = parameters_of(optimizer)[0].requires_grad_()
        p.grad = torch.zeros_like(p)
        with pytest.raises(
            RuntimeError, match=r"`fused=True` requires all the params to be floating point Tensors"
        ):
            optimizer.step()


def test_fused_needs_sgd_s_momentum() -> None:
    """G2: the kernel knows no other; said at once, and when it is set later."""
    with pytest.raises(ValueError, match="Pass momentum_form='sgd'"):
        PowerSGDOptimizer(start(), lr=0.1, fused=True)
    optimizer = PowerSGDOptimizer(start(), lr=0.1)
    optimizer.param_groups[0]["fused"] = True
    give(optimizer, gradients(parameters_of(optimizer), 0))
    with pytest.raises(ValueError, match="Pass momentum_form='sgd'"):
        optimizer.step()


@pytest.mark.parametrize("form", FORMS)
def test_maximizing_is_minimizing_the_negative(form: str) -> None:
    """G5: bit by bit, compressed or not: compression commutes with the sign."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    up, _ = pair(start(), FORMS[form], **options, maximize=True)
    down, _ = pair(start(), FORMS[form], **options)
    for step in range(5):
        made = gradients(parameters_of(up), step)
        give(up, made)
        give(down, [-g for g in made])
        up.step()
        down.step()
        assert bits(parameters_of(up)) == bits(parameters_of(down))


def test_maximize_may_change() -> None:
    """G5: in mid-run, as with SGD."""
    ours, theirs = pair(start(), UNCOMPRESSED, lr=0.1, momentum=0.9)
    assert isinstance(theirs, SGD)
    for maximize in (True, False, True):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["maximize"] = maximize
        train([ours, theirs], range(2))
    assert bits(parameters_of(ours)) == bits(parameters_of(theirs))
