"""B: the step. What it reads, when it reads it, and what it leaves alone.

B4, B11 and B12 are in test_sgd_equality.py, B7 in test_gradients.py, B10 in test_complex.py.
"""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from efsgd import NonFiniteGradientError, PowerSGDOptimizer
from tests.optimizers.swap_in.pairs import (
    COMBINATIONS,
    FULL_RANK,
    UNCOMPRESSED,
    assert_close,
    assert_equal,
    give,
    gradients,
    momenta_of,
    pair,
    random_tensor,
    skip_unless_sgd_takes,
    start,
    train,
)
from tests.simulation import bits, parameters_of, snapshot


class Closure:
    """Computes a loss, and remembers what it met."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter, self.values, self.grad_modes = parameter, [], []

    def __call__(self) -> Tensor:
        self.values.append(self.parameter.detach().clone())
        self.grad_modes.append(torch.is_grad_enabled())
        self.parameter.grad = None
        loss = (self.parameter - 1).square().sum()
        loss.backward()
        return loss


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("by_keyword", [False, True])
def test_closure(mode: Any, by_keyword: bool) -> None:
    """B1, F6: run once, first, with gradients enabled; its value is returned."""
    p = torch.zeros(8, 8, requires_grad=True)
    optimizer, closure = PowerSGDOptimizer([p], lr=0.1), Closure(p)
    with mode():
        loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
    assert loss.item() == 64.0
    assert closure.grad_modes == [True]
    assert torch.equal(closure.values[0], torch.zeros(8, 8))
    assert not torch.equal(p, closure.values[0])
    assert p.is_leaf  # the update itself was not recorded
    assert optimizer.step() is None


def test_a_closure_that_fails() -> None:
    """B1: its error comes through, nothing has changed, and the next step works."""
    optimizer, _ = pair(start(), FULL_RANK, lr=0.1, momentum=0.9)
    train([optimizer], range(1))
    before = bits(snapshot([optimizer]))

    def closure() -> None:
        raise ZeroDivisionError("a batch of nothing")

    with pytest.raises(ZeroDivisionError, match="a batch of nothing"):
        optimizer.step(closure)
    assert bits(snapshot([optimizer])) == before
    train([optimizer], range(1, 2))


@pytest.mark.parametrize("extra", [UNCOMPRESSED, FULL_RANK], ids=["off", "full rank"])
def test_nothing_happens_without_gradients(extra: dict[str, Any]) -> None:
    """B2: neither weight decay nor momentum moves a parameter that has no gradient."""
    optimizer, _ = pair(start(), extra, lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    assert bits(parameters_of(optimizer)) == bits(start())
    train([optimizer], range(2))
    before = bits([parameters_of(optimizer), optimizer.state_dict()["state"]])
    optimizer.zero_grad()
    optimizer.step()
    assert bits([parameters_of(optimizer), optimizer.state_dict()["state"]]) == before


def test_zero_gradients_count() -> None:
    """B2: a gradient of zeros lets momentum and weight decay go on."""
    for options in ({"momentum": 0.9}, {"weight_decay": 0.1}):
        optimizers = pair(start(), UNCOMPRESSED, lr=0.1, **options)
        train(optimizers, range(1))
        before = bits(parameters_of(optimizers[0])[4])
        for optimizer in optimizers:
            give(optimizer, [torch.zeros_like(p) for p in parameters_of(optimizer)])
            optimizer.step()
        assert bits(parameters_of(optimizers[0])[4]) != before
        assert_equal(*optimizers)


def test_order_of_the_update() -> None:
    """B3: sign, then decay, then momentum (the first undampened), nesterov, and the step."""
    x = torch.tensor([2.0], requires_grad=True)
    optimizer = PowerSGDOptimizer([x], 0.25, 0.5, 0.5, 1.0, maximize=True, momentum_form="sgd")
    x.grad = torch.tensor([6.0])
    optimizer.step()  # g = -6 + 2 = -4, m = -4, x = 2 + 1
    assert (x.item(), optimizer.state[x]["momentum_buffer"].item()) == (3.0, -4.0)
    optimizer.step()  # g = -6 + 3 = -3, m = -2 - 1.5, x = 3 + 0.875
    assert (x.item(), optimizer.state[x]["momentum_buffer"].item()) == (3.875, -3.5)
    optimizer.param_groups[0].update(dampening=0, nesterov=True)
    optimizer.step()  # g = -6 + 3.875, m = -1.75 - 2.125, x = 3.875 + 0.25 (2.125 + 1.9375)
    assert (x.item(), optimizer.state[x]["momentum_buffer"].item()) == (4.890625, -3.875)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_tensor_settings(shape: tuple[int, ...]) -> None:
    """B5: lr and weight_decay may be tensors of one element, changed in place between steps."""
    lr, decay = torch.full(shape, 0.1), torch.full((), 0.5)
    skip_unless_sgd_takes(lr=lr)
    p = random_tensor((4, 3), torch.float32, 4).requires_grad_()
    twin = p.detach().clone().requires_grad_()
    ours = PowerSGDOptimizer([p], lr=lr, weight_decay=decay, **UNCOMPRESSED)
    theirs = torch.optim.SGD([twin], lr=lr, weight_decay=0.5)
    for factor, other_decay in ((1.0, 0.5), (0.25, 0.0), (3.0, 0.1)):
        lr.fill_(0.1 * factor)
        decay.fill_(other_decay)
        theirs.param_groups[0]["weight_decay"] = decay.item()
        train([ours, theirs], range(1))
        assert_equal(ours, theirs, factor)
    assert ours.param_groups[0]["lr"] is lr
    assert ours.param_groups[0]["weight_decay"] is decay


def test_settings_are_read_at_each_step() -> None:
    """B6: whatever is changed in a group holds from the next step on."""
    optimizers = pair(start(), UNCOMPRESSED, lr=0.1, momentum=0.9)
    for options in COMBINATIONS:
        for optimizer in optimizers:
            optimizer.param_groups[0].update(options, lr=0.01 + 0.1 * options["weight_decay"])
        train(optimizers, range(2))
        assert_equal(*optimizers, options)


@pytest.mark.parametrize("extra", [UNCOMPRESSED, FULL_RANK], ids=["off", "full rank"])
def test_a_model_that_changes_its_dtype(extra: dict[str, Any]) -> None:
    """B8: as of an optimizer made for the new dtype, whose momenta are converted."""
    model = torch.nn.Linear(6, 5)
    twin = torch.nn.Linear(6, 5).double()
    optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1, momentum=0.9, **extra)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    train([optimizer], range(2))
    model.double()
    twin.load_state_dict(model.state_dict())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        theirs.state[q]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].double()
    train([optimizer, theirs], range(2, 5))
    assert all(buffer.dtype == torch.float64 for buffer in momenta_of(optimizer))
    # Errors that were float32 join the first of these steps.
    tolerance = 1e-6 if extra is FULL_RANK else 0.0
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0.0, atol=tolerance)


def test_data_that_is_replaced() -> None:
    """B8: other memory of the same shape is taken; another shape is an error that says so."""
    optimizers = pair(start(shapes=[(6, 5), (5,)]), UNCOMPRESSED, lr=0.1, momentum=0.9)
    train(optimizers, range(2))
    for optimizer in optimizers:
        for p in parameters_of(optimizer):
            p.data = random_tensor(p.shape, p.dtype, 5)
    train(optimizers, range(2, 4))
    assert_equal(*optimizers)
    parameters_of(optimizers[0])[0].data = torch.zeros(6, 4)
    optimizers[0].zero_grad()
    with pytest.raises(ValueError, match=r"of parameter 0: its shape is \[6, 5\] and must be"):
        optimizers[0].step()


@pytest.mark.parametrize("form", ["paper", "sgd"])
def test_memory_format_of_the_momentum(form: str) -> None:
    """B9: that of the parameter, as with SGD; and it is kept."""
    p = torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    q = p.detach().clone().requires_grad_()
    ours = PowerSGDOptimizer([p], lr=0.1, momentum=0.9, momentum_form=form)
    theirs = torch.optim.SGD([q], lr=0.1, momentum=0.9)
    for _ in range(3):
        p.grad = random_tensor(p.shape, p.dtype, 6)
        q.grad = torch.empty_like(q).copy_(p.grad)  # SGD's momentum is a copy of its first gradient
        ours.step()
        theirs.step()
    buffer = ours.state[p]["momentum_buffer"]
    assert buffer.stride() == p.stride() == theirs.state[q]["momentum_buffer"].stride()
    assert buffer.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_gradients(policy: str, value: float) -> None:
    """B13: a step with NaN leaves no trace in errors, momenta and parameters."""
    options = {"rank": 1, "min_compression_rate": 0.0, "nonfinite": policy}
    optimizer, twin = (pair(start(), options, lr=0.1, momentum=0.9)[0] for _ in range(2))
    train([optimizer, twin], range(2))
    bad = gradients(parameters_of(optimizer), 2)
    bad[4][0, 0] = value
    give(optimizer, bad)
    if policy == "raise":
        with pytest.raises(NonFiniteGradientError, match="parameter 4"):
            optimizer.step()
    else:
        optimizer.step()
    train([optimizer, twin], range(3, 6))
    assert bits(snapshot([optimizer])) == bits(snapshot([twin]))


def a_compressed_run(seed: int) -> Any:
    options = {"rank": 1, "min_compression_rate": 0.0, "warm_start": False, "seed": seed}
    optimizer, _ = pair(start(), options, lr=0.1, momentum=0.9)
    train([optimizer], range(3))
    return bits([parameters_of(optimizer), optimizer.state_dict()["state"]])


def test_random_numbers() -> None:
    """B14: the seed decides alone; nobody's generator is read or advanced."""
    expected = a_compressed_run(seed=3)
    torch.manual_seed(123)
    kept = [random_tensor((3, 3), torch.float32, i) for i in range(5)]  # other objects, other ids
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert a_compressed_run(seed=3) == expected
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert a_compressed_run(seed=4) != expected
    assert len(kept) == 5


class HostReads(TorchDispatchMode):
    """Counts how often numbers are read out of tensors, but for those of `on_host`."""

    def __init__(self, on_host: set[int]) -> None:
        super().__init__()
        self.count, self._on_host = 0, on_host

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].data_ptr() not in self._on_host
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", [None, 1.0])
def test_reads_by_the_host(norm: float | None) -> None:
    """B15: their number does not grow with the model.

    None at all is impossible: whether a step is applied is decided by what all workers sent, and
    the host must know it.
    """
    counts = {}
    for number in (2, 20):
        shapes, extra = [(8, 6), (5,)] * number, {"rank": 1, "max_grad_norm": norm}
        optimizer, _ = pair(start(shapes=shapes), extra, lr=0.1, momentum=0.9)
        train([optimizer], range(2))
        flags = {state["momentum_started"].data_ptr() for state in optimizer.state.values()}
        with HostReads(flags) as reads:
            optimizer.step()
        counts[number] = reads.count
    assert counts[2] == counts[20]
    assert counts[2] > 0  # it counts something


def test_parameters_without_data() -> None:
    """B16: on the meta device an optimizer can be made, and loaded."""
    model = torch.nn.Linear(6, 5, device="meta")
    optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1, momentum=0.9, rank=1)
    assert all(t.is_meta for s in optimizer.state.values()
               for k, t in s.items() if k != "momentum_started")  # fmt: skip
    optimizer.load_state_dict(optimizer.state_dict())


def test_full_rank_of_workers_that_are_one() -> None:
    """B4: with an error memory that stays at rounding, over many steps."""
    optimizers = pair(start(torch.float64), FULL_RANK, lr=0.01, momentum=0.9, nesterov=True)
    train(optimizers, range(50))
    assert_close(*optimizers)
