"""What a plan says is sent is what optimizers send."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.workloads import shapes_of
from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    Identity,
    PowerSGD,
    PowerSGDPlus,
    RandomK,
    SignNorm,
    TensorCompressor,
    TopK,
    UniformQuantized,
)
from efsgd.planning.sending import Echo, Message, Sending
from efsgd.planning.tensors import KNOWN_SHAPES, trained_of
from efsgd.testing import lockstep, step_together
from efsgd.wire.collectives import AllGather, AllReduceMean, AllToAll, run
from efsgd.wire.control_words import ControlWords

SHAPES = [(12, 16), (12,), (7, 5, 3), ()]
COMPRESSORS = [
    Identity(),
    PowerSGD(rank=2),
    PowerSGD(rank=2, alternating=True),
    PowerSGDPlus(rank=2, refresh_every=2),
    TopK(density=0.1),
    RandomK(density=0.1),
    SignNorm(),
    UniformQuantized(bits=8),
    LQSGD(rank=2),
    LQSGD(rank=2, aggregation="scatter"),
]


def sent(compressor: Any, workers: int, steps: int) -> list[list[Message]]:
    """What one of several workers sends in each of its first steps."""
    optimizers = []
    for worker in range(workers):
        parameters = [torch.zeros(shape, requires_grad=True) for shape in SHAPES]
        generator = torch.Generator().manual_seed(worker)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizers.append(ErrorFeedbackSGD(parameters, lr=0.1, compressor=compressor))
    found = []
    for _ in range(steps):
        trace = step_together(optimizers)
        own = optimizers[0].communication_stats()["collectives"]
        found.append([Message(t.kind, t.nbytes) for t in trace[len(trace) - own :]])
    return found


@pytest.mark.parametrize("workers", [2, 5])
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_messages_are_those_of_a_step(compressor: Any, workers: int) -> None:
    sending = Sending(compressor, trained_of(SHAPES))
    steps = sent(compressor, workers, 2)
    kinds = [compressor.step_kind(step, sending.compressor.settings()) for step in range(2)]
    expected = {kind: tuple(own) for kind, own in zip(kinds, steps, strict=True)}
    sending.messages(3)  # others are derived from what is known of these
    found = sending.messages(workers)
    assert sorted(map(repr, expected.values())) == sorted(repr(own) for _, own in found)
    assert sum(often for often, _ in found) == pytest.approx(1)
    words = 4 * ControlWords.count(len(SHAPES), workers)
    sizes = {compressor.payload_bytes(SHAPES, step=k, world_size=workers) for k in range(2)}
    assert {sum(m.nbytes for m in own) - words for _, own in found} == sizes


def test_kinds_of_steps_count_as_often_as_they_are() -> None:
    plus = Sending(PowerSGDPlus(rank=2, refresh_every=5), trained_of(SHAPES))
    assert sorted(often for often, _ in plus.messages(2)) == [0.2, 0.8]
    by_turns = Sending(PowerSGD(rank=2, alternating=True), trained_of(SHAPES))
    whole = Sending(PowerSGD(rank=2), trained_of(SHAPES))
    assert (by_turns.collectives(2), whole.collectives(2)) == (1, 2)
    vectors = 4 * (12 + 1 + ControlWords.count(len(SHAPES), 2))
    assert by_turns.nbytes(2) - vectors == (whole.nbytes(2) - vectors) / 2


def test_made_up_code_is_not_run() -> None:
    class Own(TensorCompressor):
        def fields(self, shape: torch.Size) -> Any:
            return TopK(density=0.5).fields(shape)

        def compress(self, *_: Any) -> Any:
            raise AssertionError("there is nothing to compress")

    own = dataclasses.dataclass(frozen=True)(Own)()
    ((_, messages),) = Sending(own, trained_of(SHAPES)).messages(3)
    assert [each.kind for each in messages] == ["AllReduceMean", "AllGather"]


def test_many_workers_add_their_control_words() -> None:
    sending = Sending(SignNorm(), trained_of(SHAPES))
    two, many = (sending.nbytes(workers) for workers in (2, 10_000))
    assert many - two == 4 * 9998


def test_memory_is_counted_from_buffers() -> None:
    trained = trained_of([(512, 512), (64,)])
    d = 4 * 512 * 512
    # Errors and scratch, and what is multiplied out at once, which is all of so small a matrix,
    # and factors; Top K has the mean.
    assert 3 * d < Sending(PowerSGD(rank=1), trained).kept_bytes < 3.05 * d
    assert 3 * d < Sending(TopK(density=0.1), trained).kept_bytes < 3.5 * d


@pytest.mark.parametrize("name", KNOWN_SHAPES)
def test_shapes_that_are_known_by_name(name: str) -> None:
    assert list(KNOWN_SHAPES[name]()) == shapes_of(name)


@given(st.lists(st.integers(1, 2**23), min_size=1, max_size=20))
def test_buckets_hold_all_gradients_in_the_order_of_the_backward_pass(sizes: list[int]) -> None:
    trained = trained_of([(size,) for size in sizes])
    buckets = trained.buckets()
    assert sum(nbytes for _, nbytes in buckets) == trained.nbytes
    parts = [part for part, _ in buckets]
    assert parts == sorted(parts) and parts[-1] == 1.0
    assert all(nbytes >= 25 * 2**20 for _, nbytes in buckets[1:-1])
    assert len(buckets) == 1 or buckets[0][1] >= 2**20
    last = sizes[-1]
    if 4 * last >= 2**20:  # it fills the first bucket by itself
        assert buckets[0] == (pytest.approx(last / sum(sizes)), 4 * last)


def test_buckets_by_measured_arrivals() -> None:
    trained = dataclasses.replace(trained_of([(2**19,), (2**19,)]), arrivals=(0.25, 0.75))
    assert trained.buckets() == [(0.25, 2**21), (0.75, 2**21)]


def test_an_echo_answers_as_workers_that_send_the_same_would() -> None:
    def all_of() -> Any:
        found = []
        for kind in (AllReduceMean, AllGather, AllToAll):
            answer = yield kind(torch.arange(6.0).view(3, 2), "an example")
            found.append(answer.clone())
        return found

    expected = lockstep([all_of() for _ in range(3)]).results[0]
    for own, known in zip(run(all_of(), Echo(3)), expected, strict=True):
        assert torch.equal(own, known)


@pytest.mark.parametrize("wrong", [[(3, -1)], [(2.5,)], ["ab"], [3], [(True,)]])
def test_shapes_that_are_none(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"Invalid shape: .* integers of at least 0"):
        trained_of(wrong)


def test_models_without_anything_to_train() -> None:
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    for wrong in ([], [(0, 3)], frozen):
        with pytest.raises(ValueError, match="nothing that is trained"):
            trained_of(wrong)
    with pytest.raises(TypeError, match="not both"):
        trained_of([torch.zeros(2), (2,)])


def test_gradients_have_the_size_of_their_dtype() -> None:
    model = torch.nn.Linear(8, 4).to(torch.bfloat16)
    assert trained_of(model).nbytes == 2 * 36
    assert trained_of(model.double()).dtype == torch.float64
