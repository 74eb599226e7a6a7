"""Laws of what ends keep between steps: EF and EF21, of microbatches; and failed steps."""

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from efsgd import (
    RandomK,
    SpectralAtomo,
    SymmetricQuantized,
    TensorCompressor,
    TopK,
    UniformQuantized,
)
from efsgd.pipeline import Link
from efsgd.testing.strategies import seeds
from tests.pipeline.pair import COMPRESSORS, DTYPES, Operation, Pair, activation_shapes, made
from tests.strategies import examples

MEMORIES = ["none", "error", "difference", "samples"]
PER = st.sampled_from(["sample", "microbatch"])


def make(memory: str, compressor: TensorCompressor | None = None, **options: Any) -> Pair:
    return Pair(Link(compressor or UniformQuantized(bits=3), memory=memory, **options))  # type: ignore[arg-type]


def ids_of(pair: Pair, ids: list[int]) -> list[int] | None:
    return ids if pair.sender.link.memory == "samples" else None


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@examples(12)
@given(shape=activation_shapes, dtype=st.sampled_from(DTYPES), per=PER, seed=seeds())
def test_errors_telescope(
    compressor: TensorCompressor, shape: tuple[int, ...], dtype: torch.dtype, per: str, seed: int
) -> None:
    pair = make("error", compressor, per=per)
    inputs = [made(shape, dtype, seed, step) for step in range(4)]
    found = [pair.step(x, step) for step, x in enumerate(inputs)]
    assert pair.sender.memory is not None and pair.receiver.memory is not None
    errors = pair.sender.memory.state()["values"]
    received = torch.stack(found).double().sum(0) + sum(error.double() for error in errors)
    given_ = torch.stack(inputs).double().sum(0)
    # Rounding of what arrives in the dtype, and of sums in float32 or float64.
    scale = max(x.abs().max().item() for x in [*found, *inputs, *errors])
    assert (received - given_).abs().max() <= 16 * torch.finfo(dtype).eps * scale
    assert pair.receiver.memory.state()["values"] == []


def test_errors_belong_to_microbatches_and_outputs() -> None:
    pair = make("error", TopK(density=0.5))
    first, second = torch.tensor([[[2.0, 1.0]], [[8.0, 16.0]]], dtype=torch.float64)
    for step in range(2):
        pair.begin(step)
        found = [pair.carry([first, second], chunk=chunk) for chunk in range(2)]
        pair.end()
    # Of the second step: what was left out in the first has doubled, or equals the largest.
    for own, other in found:
        assert own.tolist() in ([[2.0, 0.0]], [[0.0, 2.0]])
        assert other.tolist() in ([[16.0, 0.0]], [[0.0, 16.0]])
    assert pair.sender.memory is not None
    assert sorted(pair.sender.memory.state()["keys"]) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@examples(15)
@given(
    st.sampled_from([UniformQuantized(bits=4), SymmetricQuantized(bits=3), TopK(density=0.5)]),
    activation_shapes, st.sampled_from(DTYPES), PER, seeds(),
)  # fmt: skip
def test_differences_converge_to_a_fixed_activation(
    compressor: TensorCompressor, shape: tuple[int, ...], dtype: torch.dtype, per: str, seed: int
) -> None:
    pair, x = make("difference", compressor, per=per), made(shape, dtype, seed)
    for step in range(30):
        found = pair.step(x, step)
        first, second = pair.digests()
        assert first == second
    # Top-K halves the number of elements that are missing, quantization the largest of them.
    assert (found - x).abs().max() <= 4 * torch.finfo(dtype).eps * x.abs().max()


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@examples(12)
@given(dtype=st.sampled_from(DTYPES), per=PER, seed=seeds())
def test_differences_are_those_of_the_formula(
    compressor: TensorCompressor, dtype: torch.dtype, per: str, seed: int
) -> None:
    """h ← h + C(x − h), where C is a link without memory."""
    pair, plain = make("difference", compressor, per=per), make("none", compressor, per=per)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    h = torch.zeros(3, 40, dtype=wide)
    for step in range(4):
        x = made((3, 40), dtype, seed, step)
        h = h + plain.step(x.to(wide) - h, step)
        assert torch.equal(pair.step(x, step), h.to(dtype))
    assert pair.digests()[0] == pair.digests()[1]


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_what_is_not_finite_leaves_memories_alone(
    memory: str, compressor: TensorCompressor
) -> None:
    pair, ids = make(memory, compressor), [4, 2, 9]
    for step in range(2):
        pair.step(made((3, 6), torch.float32, step), step, ids_of(pair, ids))
    before = pair.digests()
    x = made((3, 6), torch.float32, 5)
    x[1, 4] = torch.inf
    assert pair.step(x, 3, ids_of(pair, ids)).isnan().all()
    assert pair.digests() == before
    assert pair.step(made((3, 6), torch.float32, 6), 4, ids_of(pair, ids)).isfinite().all()
    assert pair.digests() != before or memory == "none"


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_step_that_fails_and_evaluation_leave_memories_alone(memory: str) -> None:
    pair, other = make(memory), make(memory)
    for step, x in enumerate(made((4, 5, 3), torch.float32, 1)):
        for own in (pair, other):
            kept = own.step(x, step, ids_of(own, [3, 1, 7, 5, 6]))
        before = pair.digests()
        unknown = ids_of(pair, [30, 1, 7, 50, 6])
        failed = pair.step(x * 2, step, unknown, is_kept=False)
        assert failed.isfinite().all()
        assert pair.digests() == before
        evaluated = pair.step(x, step, trains=False)
        assert torch.equal(evaluated, make("none").step(x))
        assert pair.digests() == before == other.digests()
    assert torch.equal(kept, pair.step(x, step)) == (memory == "none") or memory == "samples"


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_saved_memory_goes_on_to_the_bit(memory: str) -> None:
    pair, ids = make(memory, RandomK(density=0.5)), [2, 0, 1]
    for step in range(3):
        pair.step(made((3, 4), torch.float32, step), step, ids_of(pair, ids))
    file = io.BytesIO()
    torch.save([end.memory.state() for end in pair.ends if end.memory], file)
    before = pair.digests()
    expected = [pair.step(made((3, 4), torch.float32, n), n, ids_of(pair, ids)) for n in (3, 4)]
    file.seek(0)
    loaded = make(memory, RandomK(density=0.5))
    loaded.step(made((2, 4), torch.float32, 9), 0, ids_of(pair, [8, 2]))  # all of it is replaced
    for end, state in zip(loaded.ends, torch.load(file, weights_only=True), strict=True):
        assert end.memory is not None
        end.memory.load(state, torch.device("cpu"))
    assert loaded.digests() == before
    found = [loaded.step(made((3, 4), torch.float32, n), n, ids_of(pair, ids)) for n in (3, 4)]
    assert all(map(torch.equal, found, expected))
    assert loaded.digests() == pair.digests()


@pytest.mark.parametrize("memory", ["none", "error", "difference"])
def test_memories_are_in_units_of_the_loss(memory: str) -> None:
    """Scales are powers of two, by which nothing is rounded."""
    pair, scaled = make(memory), make(memory)
    for step, scale in enumerate([2.0**10, 2.0**10, 2.0**-3, 1.0]):
        x = made((3, 6), torch.float32, step)
        expected = pair.step(x, step)
        assert torch.equal(scaled.step(x * scale, step, scale=scale), expected * scale)
        assert scaled.digests() == pair.digests()


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_state_counts_the_last_step_which_can_still_be_undone(memory: str) -> None:
    pair, other = make(memory), make(memory)
    for step in range(3):
        ids = ids_of(pair, [step, step + 1, 9])
        before = pair.digests()
        pair.begin(step, ids)
        (found,) = pair.carry([made((3, 4), torch.float32, step)])
        pending, states = pair.digests(), [end.memory.state() for end in pair.ends if end.memory]
        pair.end(is_kept=False)
        assert pair.digests() == before
        assert torch.equal(pair.step(made((3, 4), torch.float32, step), step, ids), found)
        assert pair.digests() == pending
        assert pending[0] != before[0] or memory == "none"
    for end, state in zip(other.ends, states, strict=True):
        assert end.memory is not None
        end.memory.load(state, torch.device("cpu"))
    assert other.digests() == pending
    x = made((3, 4), torch.float32, 3)
    ids = ids_of(pair, [0, 9, 7])
    assert torch.equal(other.step(x, 3, ids), pair.step(x, 3, ids))


@pytest.mark.parametrize("memory", ["error", "difference", "samples"])
def test_a_tensor_of_another_shape_than_what_is_kept_is_an_error(memory: str) -> None:
    """Before anything is sent, and at both ends where both keep something."""
    pair = make(memory)
    pair.step(torch.ones(1, 4), 0, ids_of(pair, [5]))  # one row would do for all
    before = pair.digests()
    x = torch.ones(1, 8) if memory == "samples" else torch.ones(3, 4)
    pair.begin(1, ids_of(pair, [5]))
    for end in pair.ends if memory != "error" else [pair.sender]:
        is_sender = end is pair.sender
        operation = Operation(dist.isend if is_sender else dist.irecv, x)
        what = "output 0 has shape .*kept of it has .*memory='none'"
        with pytest.raises(
            ValueError, match=f"Memory of {'sent' if is_sender else 'received'}: .*{what}"
        ):
            if is_sender:
                end.pack([operation], 0, trains=True, scale=1.0)
            else:
                end.expect([operation], 0, trains=True)
    assert pair.digests() == before


@pytest.mark.parametrize("memory", MEMORIES)
def test_modes_of_the_caller_change_nothing(memory: str) -> None:
    compressor = SpectralAtomo(rank=1)  # has products of matrices, which autocast would round
    pair, other = (
        make(memory, compressor, per="microbatch"),
        make(memory, compressor, per="microbatch"),
    )
    for step in range(4):
        x, ids = made((8, 6), torch.float32, step), ids_of(pair, [1, 2, 3, 4, 5, 6, 7, 8 + step])
        with torch.inference_mode(step % 2 == 0), torch.autocast("cpu", enabled=step > 1):
            found = pair.step(x, step, ids)
        assert torch.equal(found, other.step(x, step, ids))
    assert pair.digests() == other.digests()
