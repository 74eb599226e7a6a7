"""Parameters that do not require a gradient are not read, compared, sent or refused."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd import GradientAverager, PowerSGDOptimizer
from efsgd.testing import lockstep, step_together
from tests.simulation import bits, broadcast, snapshot


class Unreadable(Tensor):
    """Has a shape and a dtype, and nothing else that works, like some quantized subclasses."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "dim", "size", "is_complex", "__hash__", "detach", "__repr__"):
            return super().__torch_function__(func, types, args, kwargs or {})
        raise AssertionError(f"a frozen parameter was read by {name}")


def quantized() -> Tensor:
    """Of a dtype that torch is about to give up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(6, 5), 0.1, 0, torch.qint8)


def of_inference_mode() -> Tensor:
    with torch.inference_mode():
        return torch.ones(6, 5)


KINDS: dict[str, Callable[[int], Tensor]] = {
    "values that differ": lambda worker: torch.full((6, 5), float(worker)),
    "meta": lambda _: torch.empty(6, 5, device="meta"),
    "quantized": lambda _: quantized(),
    "float8": lambda _: torch.ones(6, 5).to(torch.float8_e4m3fn),
    "integers": lambda _: torch.ones(6, 5, dtype=torch.int32),
    "sparse": lambda _: torch.eye(5).to_sparse(),
    "unreadable": lambda _: torch.ones(6, 5).as_subclass(Unreadable),
    "inference mode": lambda _: of_inference_mode(),
    "shapes that differ": lambda worker: torch.ones(2 + worker),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, 1])
def test_it_is_left_alone(kind: str, place: int) -> None:
    workers = []
    for worker in range(2):
        trained = torch.full((8, 6), float(worker), requires_grad=True)
        listed = [trained]
        listed.insert(place, KINDS[kind](worker))
        workers.append(PowerSGDOptimizer(listed, lr=0.1, momentum=0.9, rank=1))
    broadcast(workers)
    trained_ones = [w.param_groups[0]["params"][1 - place] for w in workers]
    assert torch.equal(*trained_ones)
    for step in range(3):
        for worker, parameter in enumerate(trained_ones):
            parameter.grad = torch.arange(48.0).view(8, 6) * (1 + worker) + step
        step_together(workers)
    assert torch.equal(*trained_ones)
    workers[0].load_state_dict(workers[0].state_dict())
    averagers = [GradientAverager(w.param_groups) for w in workers]
    lockstep([a.exchange(2, worker) for worker, a in enumerate(averagers)])


@pytest.mark.parametrize("kind", ["meta"])
def test_one_that_is_trained_is_named(kind: str) -> None:
    bad = KINDS[kind](0).requires_grad_()
    optimizer = PowerSGDOptimizer([("good", torch.ones(3, requires_grad=True)), ("bad", bad)])
    with pytest.raises(RuntimeError, match=r"parameter 1 \(bad\) is on the meta device"):
        optimizer.step()


NO_STEP_MAY_CHANGE_IT = r"parameter 1 \(bad\) is an inference tensor.*clone\(\)"


def test_one_of_inference_mode_that_is_trained_is_named_at_once() -> None:
    bad = of_inference_mode()
    with torch.inference_mode():
        bad.requires_grad_()
    with pytest.raises(RuntimeError, match=NO_STEP_MAY_CHANGE_IT):
        PowerSGDOptimizer([("good", torch.ones(3, requires_grad=True)), ("bad", bad)])
    PowerSGDOptimizer([torch.nn.Parameter(bad.clone())])  # as the error says


@pytest.mark.parametrize("who", [[0], [1], [0, 1]])
def test_one_of_inference_mode_that_is_to_be_trained_is_named_on_all_workers(
    who: list[int],
) -> None:
    """It was frozen before, and is such a tensor on these workers."""
    workers = []
    for worker in range(2):
        bad = of_inference_mode() if worker in who else torch.ones(6, 5)
        named = [("good", torch.ones(3, requires_grad=True)), ("bad", bad)]
        workers.append(PowerSGDOptimizer(named, lr=0.1, momentum=0.9, rank=1))
        named[0][1].grad = torch.full((3,), 1.0 + worker)
    step_together(workers)
    for optimizer in workers:
        with torch.inference_mode():
            optimizer.param_groups[0]["params"][1].requires_grad_()
    before = bits(snapshot(workers))
    exchanges = [optimizer.exchange(2, worker) for worker, optimizer in enumerate(workers)]
    with pytest.raises(RuntimeError) as caught:
        lockstep(exchanges)
    for text in (str(caught.value), *caught.value.__notes__):  # of both workers
        assert re.search(NO_STEP_MAY_CHANGE_IT, text)
    assert bits(snapshot(workers)) == before
