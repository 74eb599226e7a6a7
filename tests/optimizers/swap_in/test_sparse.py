"""G4: sparse gradients. They are made dense and sent uncompressed."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from efsgd import NonFiniteGradientError, PowerSGDOptimizer
from tests.optimizers.swap_in.pairs import COMBINATIONS, FORMS, pair, random_tensor
from tests.simulation import bits, difference, errors_of, make_workers, parameters_of, step_with

SGD_FORMS = ["off", "full rank", "rank 1"]
#: float64, where torch works on sparse tensors and ours on dense ones: the same sums.
ROUNDING = 1e-12


def rosenbrock_gradient(point: Tensor, axis: int, *, is_sparse: bool) -> Tensor:
    """The part along one axis of the gradient of (1 - x)² + 100 (y - x²)²; in pieces if sparse."""
    x, y = point.tolist()
    part = (-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x))[axis]
    dense = torch.zeros(2, dtype=point.dtype)
    dense[axis] = part
    if not is_sparse:
        return dense
    pieces = torch.tensor([part - part / 4, part / 4], dtype=point.dtype)
    return torch.sparse_coo_tensor([[axis, axis]], pieces, (2,), check_invariants=True)


@pytest.mark.parametrize("form", SGD_FORMS)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.5}, {"momentum": 0.5, "nesterov": True}],
    ids=str,
)
def test_rosenbrock(options: dict[str, Any], form: str) -> None:
    """G4: the path of SGD with the same sparse, uncoalesced gradients, one axis at a time."""
    begin = torch.tensor([1.5, 1.5], dtype=torch.float64, requires_grad=True)
    ours, theirs = pair([begin], FORMS[form], lr=1e-4, **options)
    for step in range(50):
        for optimizer in (ours, theirs):
            (p,) = parameters_of(optimizer)
            p.grad = rosenbrock_gradient(p, step % 2, is_sparse=True)
            optimizer.step()
        assert difference(parameters_of(ours)[0], parameters_of(theirs)[0]) < ROUNDING
    assert not torch.equal(parameters_of(ours)[0], begin)


def embedding_gradient(step: int, *, worker: int = 0, is_sparse: bool) -> Tensor:
    """Of 12 rows of 10, some twice and most not at all."""
    rows = torch.tensor([step % 4, 5, 5])
    values = random_tensor((3, 10), torch.float64, 7, step, worker)
    sparse = torch.sparse_coo_tensor(rows[None], values, (12, 10), check_invariants=True)
    return sparse if is_sparse else sparse.to_dense()


@pytest.mark.parametrize("form", SGD_FORMS)
def test_all_arguments(form: str) -> None:
    """G4: with every combination of SGD's arguments, of which torch's own sparse path allows few.

    What is right is SGD with the same gradients, dense.
    """
    for options in COMBINATIONS:
        begin = random_tensor((12, 10), torch.float64, 8).requires_grad_()
        ours, theirs = pair([begin], FORMS[form], lr=0.1, **options)
        for step in range(3):
            for optimizer, is_sparse in ((ours, True), (theirs, False)):
                parameters_of(optimizer)[0].grad = embedding_gradient(step, is_sparse=is_sparse)
                optimizer.step()
        a, b = parameters_of(ours)[0], parameters_of(theirs)[0]
        assert difference(a, b) < ROUNDING, options


def test_gradients_stay_as_they_are() -> None:
    """B7, G4: sparse and uncoalesced, in the same memory."""
    p = torch.zeros(12, 10, dtype=torch.float64, requires_grad=True)
    optimizer = PowerSGDOptimizer([p], lr=0.1, momentum=0.9, rank=1)
    gradient = embedding_gradient(1, is_sparse=True)
    p.grad = gradient
    values, before = gradient._values(), bits(gradient._values())
    optimizer.step()
    assert p.grad is gradient
    assert gradient.is_sparse
    assert not gradient.is_coalesced()
    assert gradient._values().data_ptr() == values.data_ptr()
    assert bits(gradient._values()) == before
    assert all(not value.is_sparse for value in optimizer.state[p].values())


def test_an_embedding() -> None:
    """G4: rows that nobody asked for stay as they are, bit by bit; the others are SGD's."""
    ours = torch.nn.Embedding(12, 10, sparse=True)
    theirs = torch.nn.Embedding(12, 10)
    theirs.load_state_dict(ours.state_dict())
    before = ours.weight.detach().clone()
    optimizers: list[Optimizer] = [
        PowerSGDOptimizer(ours.parameters(), lr=0.1, momentum=0.9, rank=1, momentum_form="sgd"),
        torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9),
    ]
    for step in range(4):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(torch.tensor([step, 3, 3])).square().sum().backward()
            optimizer.step()
    assert difference(ours.weight, theirs.weight) < 1e-6  # float32, four steps
    assert torch.equal(ours.weight[4:], before[4:])
    assert not torch.equal(ours.weight[:4], before[:4])


def test_all_workers_have_sparse_gradients() -> None:
    """G4, H5: their mean is applied exactly; where one has none, it counts as zero."""
    workers = make_workers([torch.zeros(12, 10, dtype=torch.float64)], 3, lr=1.0, **FORMS["rank 1"])
    given: list[list[Tensor | None]] = [
        [embedding_gradient(0, worker=0, is_sparse=True)],
        [embedding_gradient(0, worker=1, is_sparse=True)],
        [None],
    ]
    step_with(workers, given)
    total = sum(own[0].to_dense() for own in given if own[0] is not None)
    for optimizer in workers:
        assert difference(parameters_of(optimizer)[0], -total / 3) < ROUNDING


@pytest.mark.parametrize("first", [0, 2])
def test_one_worker_has_sparse_gradients(first: int) -> None:
    """G4, H1: workers stay equal, and nothing is lost, whoever begins with it and when."""
    workers = make_workers([torch.zeros(12, 10, dtype=torch.float64)], 3, lr=1.0, **FORMS["rank 1"])
    total = torch.zeros(12, 10, dtype=torch.float64)
    for step in range(5):
        given: list[list[Tensor | None]] = [
            [embedding_gradient(step, worker=w, is_sparse=w == 1 and step >= first)]
            for w in range(3)
        ]
        step_with(workers, given)
        for own in given:
            assert own[0] is not None
            total += (own[0].to_dense() if own[0].is_sparse else own[0]) / 3
        assert len({str(bits(parameters_of(optimizer))) for optimizer in workers}) == 1
        kept = sum(errors_of(optimizer)[0] for optimizer in workers) / 3
        assert difference(-parameters_of(workers[0])[0] + kept, total) < ROUNDING


def test_nonfinite_values() -> None:
    """B13, G4: of sparse gradients are noticed, too."""
    p = torch.zeros(12, 10, dtype=torch.float64, requires_grad=True)
    optimizer = PowerSGDOptimizer([p], lr=0.1, rank=1)
    p.grad = embedding_gradient(1, is_sparse=True) * float("inf")
    with pytest.raises(NonFiniteGradientError, match="parameter 0"):
        optimizer.step()
    assert not p.any()
