"""Exchanges, transports and lockstep themselves."""

import importlib
import re
from typing import NoReturn

import pytest
import torch

from efsgd import CollectiveError, PowerSGDOptimizer, WorkerMismatchError
from efsgd.testing import LockstepError, lockstep, step_together
from efsgd.wire.collectives import (
    AllGather,
    AllReduceMean,
    AllToAll,
    Broadcast,
    Collective,
    Exchange,
    Start,
    intercept,
    run,
)
from efsgd.wire.compare import broadcast_values, checksum, checksums, compare
from efsgd.wire.transports import Alone
from tests.strategies import with_layout

CPU = torch.device("cpu")


def all_kinds(value: float) -> Exchange[list[object]]:
    """One of each collective, the last in two parts."""
    gathered = yield AllGather(torch.tensor([value]), "values")
    sent = yield Broadcast(torch.tensor([value]), "a value", source=1 if len(gathered) > 1 else 0)
    in_flight = yield Start(AllReduceMean(torch.tensor([value]), "values"))
    other = yield AllReduceMean(torch.tensor([2 * value]), "twice the values")
    mean = yield in_flight
    return [gathered.tolist(), sent.tolist(), other.tolist(), mean.tolist()]


def test_lockstep_answers_all_kinds() -> None:
    outcome = lockstep([all_kinds(value) for value in (1.0, 2.0, 6.0)])
    expected = [[[1.0], [2.0], [6.0]], [2.0], [6.0], [3.0]]
    assert outcome.results == [expected] * 3
    kinds = ["AllGather", "Broadcast", "AllReduceMean", "AllReduceMean"]
    assert [traced.kind for traced in outcome.trace] == kinds
    assert outcome.trace[0].nbytes == 4


def test_alone_answers_all_kinds() -> None:
    assert run(all_kinds(3.0), Alone()) == [[[3.0]], [3.0], [6.0], [3.0]]


def rows_of(worker: int, world_size: int) -> Exchange[list[list[int]]]:
    """A row for each worker: from whom it is, and for whom."""
    rows = torch.tensor([[worker, other] for other in range(world_size)])
    answer: torch.Tensor = yield AllToAll(rows, "rows")
    assert rows.tolist() == [[worker, other] for other in range(world_size)]  # as it was
    return answer.tolist()


def test_all_to_all_gives_each_worker_the_rows_that_are_for_it() -> None:
    outcome = lockstep([rows_of(worker, 3) for worker in range(3)])
    assert outcome.results == [[[other, worker] for other in range(3)] for worker in range(3)]
    assert [(t.kind, t.nbytes) for t in outcome.trace] == [("AllToAll", 3 * 2 * 8)]
    assert run(rows_of(0, 1), Alone()) == [[0, 0]]
    with pytest.raises(LockstepError, match="a row for each of 3"):
        lockstep([rows_of(worker, 2) for worker in range(3)])


def test_lockstep_finds_workers_that_ask_for_different_things() -> None:
    def reduce(size: int, dtype: torch.dtype = torch.float32) -> Exchange[None]:
        yield AllReduceMean(torch.zeros(size, dtype=dtype), "zeros")

    def gather() -> Exchange[None]:
        yield AllGather(torch.zeros(2), "zeros")

    def nothing() -> Exchange[None]:
        yield from ()

    def start() -> Exchange[None]:
        yield Start(AllReduceMean(torch.zeros(2), "zeros"))

    def fail() -> Exchange[None]:
        yield from ()
        raise ValueError("mine alone")

    for other in (reduce(3), reduce(2, torch.float64), gather(), nothing(), start()):
        with pytest.raises(LockstepError):
            lockstep([reduce(2), other])
    with pytest.raises(LockstepError, match="for ever") as caught:
        lockstep([reduce(2), fail()])
    assert isinstance(caught.value.__cause__, ValueError)


def test_lockstep_finds_a_buffer_that_is_touched_in_flight() -> None:
    def careless() -> Exchange[None]:
        buffer = torch.zeros(2)
        in_flight = yield Start(AllReduceMean(buffer, "zeros"))
        buffer[0] = 1
        yield in_flight

    with pytest.raises(LockstepError, match="in flight"):
        lockstep([careless(), careless()])


def test_what_all_workers_raise_is_raised_with_notes() -> None:
    def fail(worker: int) -> Exchange[None]:
        yield AllReduceMean(torch.zeros(1), "zeros")
        raise ValueError(f"of worker {worker}")

    with pytest.raises(ValueError, match="of worker 0") as caught:
        lockstep([fail(0), fail(1)])
    assert caught.value.__notes__ == ["worker 1: ValueError: of worker 1"]


def test_failures_are_raised_at_the_line_that_asked() -> None:
    heard = []

    def listening() -> Exchange[str]:
        try:
            yield AllReduceMean(torch.zeros(1), "zeros")
        except CollectiveError as error:
            heard.append(str(error))
        return "survived"

    watched = [intercept(listening(), outgoing=lambda _: None) for _ in range(2)]
    assert lockstep(watched, fail_at=0).results == ["survived"] * 2
    assert heard == ["injected failure of zeros"] * 2

    class Broken(Alone):
        def start(self, collective: Collective) -> NoReturn:
            raise CollectiveError("broken")

    assert run(listening(), Broken()) == "survived"


def test_schemas_that_differ_are_named() -> None:
    same = lockstep([compare(["a", "b"], CPU) for _ in range(3)])
    assert [traced.kind for traced in same.trace] == ["AllGather"]
    for others, words in [
        (["a", "x"], "workers 0, 2: b; worker 1: x"),
        (["a"], "workers 0, 2: b; worker 1: nothing"),
        (["a", "b", "ü"], "workers 0, 2: nothing; worker 1: ü"),
    ]:
        with pytest.raises(WorkerMismatchError, match=words) as caught:
            lockstep([compare(x, CPU) for x in (["a", "b"], others, ["a", "b"])])
        assert all(str(caught.value) in note for note in caught.value.__notes__)


def test_values_that_differ_in_one_bit_are_named() -> None:
    def values(changed: bool) -> dict[str, torch.Tensor]:
        first, second = torch.zeros(3), torch.ones(1000)
        if changed:
            second[777] = 1 + 2**-23
        return {"first": first, "second": second}

    with pytest.raises(WorkerMismatchError, match=r"second differs .* on worker 1"):
        lockstep([compare(["a"], CPU, checksums(values(w == 1))) for w in range(3)])
    assert lockstep([compare(["a"], CPU, checksums(values(True))) for _ in range(2)]).results == [
        [],
        [],
    ]


def test_values_that_one_worker_lacks_are_named() -> None:
    with pytest.raises(WorkerMismatchError, match="worker 1: nothing"):
        lockstep([compare([], CPU, {"first": 1, "second": 2}), compare([], CPU, {"first": 1})])


def test_equal_gradients_are_suspicious_unless_zero() -> None:
    def optimizers(gradient: torch.Tensor) -> list[PowerSGDOptimizer]:
        parameters = [torch.zeros(4, requires_grad=True) for _ in range(2)]
        for parameter in parameters:
            parameter.grad = gradient.clone()
        return [PowerSGDOptimizer([parameter], lr=0.1) for parameter in parameters]

    with pytest.warns(UserWarning, match="noop_hook from ") as warned:
        step_together(optimizers(torch.ones(4)))
    source = re.search(r"noop_hook from ([\w.]+)", str(warned[0].message))
    assert source is not None
    assert callable(importlib.import_module(source[1]).noop_hook)
    step_together(optimizers(torch.zeros(4)))  # any warning would be an error


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool],
)
def test_checksums_see_every_element_and_the_order(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(2, 3, 2, 2).to(dtype)
    expected = checksum(tensor)
    for layout in ("transposed", "channels_last"):
        assert checksum(with_layout(tensor, layout)) == expected
    changed = tensor.clone()
    changed[1, 2, 1, 1] = 0
    assert checksum(changed) != expected
    assert checksum(torch.zeros(5, dtype=dtype)) == 0
    assert checksum(torch.zeros(0, dtype=dtype)) == 0
    assert checksum(tensor.flip(0)) != expected or dtype == torch.bool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_checksums_do_not_depend_on_memory(dtype: torch.dtype) -> None:
    values = torch.arange(1, 8).to(dtype)
    expected = checksum(values)
    others = [
        torch.stack([values, values + 9], dim=1)[:, 0],
        torch.cat([values[:1], values])[1:],
        torch.cat([values[:3], values])[3:],
        (-values)._neg_view(),
    ]
    if dtype.is_complex:
        others.append(values.conj().resolve_conj().conj())
    for other in others:
        assert torch.equal(other, values)
        assert checksum(other) == expected
    assert checksum(values[:1].expand(7)) == checksum(values[:1].repeat(7))
    single = torch.stack([values[:1], values[1:2]], dim=1)[:, 0]  # of stride 2
    assert checksum(single) == checksum(values[:1])


def test_a_long_tensor_is_summed_in_parts() -> None:
    tensor = torch.zeros((1 << 20) + 5)
    first, second = tensor.clone(), tensor.clone()
    first[0], second[1 << 20] = 1, 1  # the same place in each part
    assert len({checksum(t) for t in (tensor, first, second)}) == 3


def test_broadcast_gives_all_the_values_of_one() -> None:
    tensors = [[torch.full((3,), float(w)), torch.full((2, 2), w).T] for w in range(3)]
    lockstep([broadcast_values(own, source=1) for own in tensors])
    assert all(torch.equal(own[0], torch.ones(3)) for own in tensors)
    assert all(torch.equal(own[1], torch.ones(2, 2).long()) for own in tensors)
