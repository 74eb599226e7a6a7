"""Claims: a steady step asks an accelerator for few operations, however many tensors there are;
and what it makes of small matrices, which share padded batches there, is what all others make.

Operations are counted on the CPU, on the way that accelerators take. What only makes another view
of a tensor is none, and a function for many tensors is one.
"""

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.workloads import Shape, shapes_of
from efsgd import ErrorFeedbackSGD, PowerSGD, PowerSGDOptimizer, PowerSGDPlus
from efsgd.algorithms.interfaces import Compressor, Placement
from tests.simulation import errors_of, parameters_of, step_with
from tests.strategies import gaussian

NO_OPERATIONS = {
    *("alias", "as_strided", "detach", "diagonal", "expand", "permute", "select", "slice", "split"),
    *("split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
    *("_reshape_alias", "_unsafe_view", "_local_scalar_dense", "empty", "empty_like"),
    *("_record_function_enter_new", "_record_function_exit", "device"),
}


class Operations(TorchDispatchMode):
    """Counts what is done, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in NO_OPERATIONS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def mixed(count: int) -> list[Shape]:
    """Many small tensors of 40 shapes of matrices, and as many vectors."""
    draw, shapes = random.Random(0), list[Shape]()
    for _ in range(count // 2):
        n, m = draw.choice((16, 24, 32, 48, 64)), draw.choice((8, 16, 32, 64))
        shapes += [(n,), (n, m, *draw.choice(((1, 1), (3, 3))))]
    return shapes


@pytest.fixture
def as_on_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placement, "saves_launches", True)


@pytest.mark.usefixtures("as_on_accelerators")
@pytest.mark.parametrize("form", ["sgd", "paper"])
@pytest.mark.parametrize(
    ("shapes", "most"),
    [(shapes_of("resnet18"), 80), (shapes_of("gpt2"), 150), (mixed(1000), 150)],
    ids=["ResNet18", "GPT-2 small", "1,000 tensors"],
)
def test_a_step_is_few_operations(shapes: list[Shape], most: int, form: str) -> None:
    with FakeTensorMode():
        ps = [torch.zeros(shape, requires_grad=True) for shape in shapes]
        optimizer = PowerSGDOptimizer(
            ps, lr=0.1, momentum=0.9, nesterov=form == "sgd", foreach=True, momentum_form=form
        )
        for p in ps:
            p.grad = torch.ones_like(p)
        for _ in range(2):
            optimizer.step()
        with Operations() as operations:
            optimizer.step()
    assert 20 < operations.counts.total() <= most, operations.counts


COMPRESSORS: list[Compressor] = [
    PowerSGD(rank=3),
    PowerSGD(rank=3, warm_start=False, batch_dims=1),
    PowerSGD(rank=2, alternating=True),
    PowerSGDPlus(rank=3, refresh_every=2),
]
# Of several ranks, one of them without a column to spare; and vectors, also of a stack.
SHAPES = [(12, 10), (6, 5, 3, 3), (2, 9), (12, 10), (30,), (4, 30), (9, 2), (3, 7, 6)]


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=str)
def test_results_are_those_of_batches_of_their_own(
    compressor: Compressor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for saves_launches in (False, True):
        monkeypatch.setattr(Placement, "saves_launches", saves_launches)
        workers = [
            ErrorFeedbackSGD(
                [gaussian(shape, 1, i).requires_grad_() for i, shape in enumerate(SHAPES)],
                lr=0.1,
                momentum=0.9,
                compressor=compressor,
                max_grad_norm=1.0,
            )
            for _ in range(2)
        ]
        for step in range(5):
            gradients = [
                [None if (step, i) == (2, 3) else gaussian(shape, 2, step, worker, i)
                 for i, shape in enumerate(SHAPES)]
                for worker in range(2)
            ]  # fmt: skip
            step_with(workers, gradients)
        first, second = ([p.detach() for p in parameters_of(worker)] for worker in workers)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        ends.append([*first, *errors_of(workers[0])])
    for a, b in zip(*ends, strict=True):
        # float64: products of other shapes round otherwise.
        assert (a - b).abs().max() < 1e-12
