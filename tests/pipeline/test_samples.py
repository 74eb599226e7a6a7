"""AQ-SGD: a memory of each sample, which goes whole at first, and then as a difference."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from efsgd import SymmetricQuantized, TensorCompressor, TopK, UniformQuantized
from efsgd.pipeline import Link
from efsgd.pipeline.samples import SampleStore
from efsgd.testing.strategies import seeds
from tests.pipeline.pair import COMPRESSORS, DTYPES, Pair, activation_shapes, made
from tests.strategies import examples


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
@examples(12)
@given(shape=activation_shapes, dtype=st.sampled_from(DTYPES), seed=seeds())
def test_the_first_visit_is_exact_and_then_equal_activations_have_no_difference(
    compressor: TensorCompressor, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    pair, x = Pair(Link(compressor, memory="samples")), made(shape, dtype, seed)
    ids = list(range(10, 10 + shape[0]))
    assert torch.equal(pair.step(x, 0, ids), x)
    assert pair.sizes == [x.numel() * dtype.itemsize]
    first, second = pair.digests()
    assert first == second
    for step in (1, 2):
        assert torch.equal(pair.step(x, step, ids), x)
        assert pair.digests() == [first, second]
    assert pair.receiver.codec is not None
    if pair.receiver.codec.compresses(x.shape, dtype):
        assert pair.sizes == [pair.receiver.codec.nbytes(x.shape, dtype)]


@pytest.mark.parametrize("per", ["sample", "microbatch"])
@pytest.mark.parametrize(
    "compressor", [UniformQuantized(bits=4), SymmetricQuantized(bits=2), TopK(density=0.3)]
)
def test_both_ends_keep_the_same_after_50_steps_of_reshuffled_samples(
    compressor: TensorCompressor, per: str
) -> None:
    pair = Pair(Link(compressor, per=per, memory="samples"))  # type: ignore[arg-type]
    plain = Pair(Link(compressor, per=per))  # type: ignore[arg-type]
    naive: dict[int, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(3)
    has_both = 0
    for step in range(50):
        ids = torch.randperm(24, generator=generator)[:8].tolist()
        pair.begin(step, ids, chunks=2)
        for chunk, own in enumerate((ids[:4], ids[4:])):
            x = made((4, 6), torch.float32, step, chunk)
            (found,) = pair.carry([x], chunk=chunk)
            known = [row for row, sample in enumerate(own) if sample in naive]
            expected = x.clone()
            if known:  # m ← m + C(a − m)
                before = torch.stack([naive[own[row]] for row in known])
                expected[known] = before + plain.step(x[known] - before, step)
            assert torch.equal(found, expected)
            has_both += 0 < len(known) < 4
            naive |= dict(zip(own, expected, strict=True))
        pair.end()
        first, second = pair.digests()
        assert first == second
    assert has_both > 1
    assert pair.sender.memory is not None
    kept = pair.sender.memory.state()["0"]
    assert sorted(kept["samples"]) == list(range(24))
    for sample, row in zip(kept["samples"], kept["rows"], strict=True):
        assert torch.equal(row, naive[sample])


def test_outputs_have_memories_of_their_own() -> None:
    pair = Pair(Link(UniformQuantized(bits=4), memory="samples", capacity=3))
    outputs = [made((3, 4), torch.float32, 1), torch.arange(3), made((3, 2, 2), torch.float64, 2)]
    for _ in range(2):
        pair.begin(ids=[5, 6, 7])
        assert all(map(torch.equal, pair.carry(outputs), outputs))
        pair.end()
    assert pair.sender.memory is not None
    assert [len(own["rows"]) for own in pair.sender.memory.state().values()] == [3, 3]


def test_more_samples_than_there_is_room_for_are_an_error_that_changes_nothing() -> None:
    pair = Pair(Link(UniformQuantized(bits=4), memory="samples", capacity=3))
    pair.step(made((2, 4), torch.float32, 1), 0, [1, 2])
    before = pair.digests()
    with pytest.raises(ValueError, match=r"4 samples, .*capacity=3.*Raise it to the number of"):
        pair.begin(ids=[2, 3, 4])  # before anything is sent
    assert pair.digests() == before
    pair.step(made((2, 4), torch.float32, 2), 1, [2, 3])
    assert pair.digests() != before
    with pytest.raises(ValueError, match=r"4 samples, .*capacity=3"):
        Pair(Link(TopK(density=0.5), memory="samples", capacity=3)).begin(ids=[1, 2, 3, 4])
    state = SampleStore(None, None)
    state.keep({(sample, 0): torch.ones(2) for sample in range(4)})
    assert pair.sender.memory is not None
    kept = pair.digests()
    with pytest.raises(ValueError, match=r"4 samples, .*capacity=3"):
        pair.sender.memory.load(state.state({}), torch.device("cpu"))
    assert pair.digests() == kept


def test_announcements_must_fit_the_microbatch() -> None:
    pair = Pair(Link(UniformQuantized(bits=4), memory="samples"))
    pair.begin(ids=[1, 2, 3])
    with pytest.raises(ValueError, match=r"3 samples were announced for a microbatch of 2"):
        pair.carry([torch.ones(2, 5)])


def test_samples_in_a_file_are_those_in_memory(tmp_path: Path) -> None:
    link = Link(UniformQuantized(bits=3), memory="samples", capacity=6)
    in_memory, in_file = Pair(link), Pair(Link(link.compressor, memory="samples", capacity=6,
                                               file=str(tmp_path / "kept")))  # fmt: skip
    for step, ids in enumerate([[0, 1, 2], [3, 1, 4], [5, 0, 3], [4, 2, 1]]):
        for pair in (in_memory, in_file):
            pair.begin(step, ids)
        x, y = made((3, 7), torch.float32, step), made((3, 4), torch.float64, step)
        expected, found = (pair.carry([x, y]) for pair in (in_memory, in_file))
        assert all(map(torch.equal, expected, found))
        in_memory.end()
        in_file.end()
        assert in_memory.digests() == in_file.digests()
    names = {f"kept.{end}.{output}" for end in ("sent", "received") for output in (0, 1)}
    assert {file.name for file in tmp_path.iterdir()} == names
    sizes = {file.name[-1]: file.stat().st_size for file in tmp_path.iterdir()}
    assert sizes == {"0": 6 * 7 * 4, "1": 6 * 4 * 8}
    first, second = in_file.ends
    assert first.memory is not None and second.memory is not None
    digest = first.memory.digest()
    state = second.memory.state()
    in_file.step(made((3, 7), torch.float32, 9), 5, [0, 1, 2])
    assert first.memory.digest() != digest
    first.memory.load(state, torch.device("cpu"))
    assert first.memory.digest() == digest
