"""What is read from the messages of a pipeline, with every memory; both ends in one process."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd import TopK, UniformQuantized
from efsgd.audit import observe
from efsgd.audit.observed import Observed
from efsgd.audit.records import observed
from efsgd.pipeline import Link
from efsgd.pipeline.codec import Reader
from tests.audit.observed_runs import assert_measured
from tests.pipeline.pair import COMPRESSORS, DETERMINISTIC, Pair, activation_shapes, made
from tests.strategies import examples

F64 = torch.float64


class Ear:
    """Keeps what the sender of a pair hands over."""

    def __init__(self, pair: Pair) -> None:
        self.heard: list[Observed] = []
        self.nbytes = 0
        pair.sender.listeners.append(self.hear)

    def hear(self, place: tuple[int, int], shape: torch.Size, buffer: Tensor, read: Reader) -> None:
        self.nbytes += buffer.nbytes
        self.heard.append(observed(f"output {place[1]}", place[0], shape, read(buffer.clone())))


def slack_of(compressor: Any, seen: Observed) -> list[float]:
    """Of codes at most a step of the coarsest grid, over the numbers of a row."""
    span = float(seen.decompressed.max() - seen.decompressed.min())
    return [2 * span * (seen.kind == "codes")] * len(seen.values)


@pytest.mark.parametrize("memory", ["none", "error", "difference"])
@pytest.mark.parametrize("per", ["sample", "microbatch"])
@examples(12)
@given(compressor=st.sampled_from(COMPRESSORS), shape=activation_shapes)
def test_messages_are_about_what_was_compressed(
    memory: Any, per: Any, compressor: Any, shape: tuple[int, ...]
) -> None:
    pair, silent = (Pair(Link(compressor, per, memory)) for _ in range(2))
    ear, before = Ear(pair), torch.zeros(shape, dtype=F64)
    for step in range(1, 4):
        x = made(shape, F64, step, *shape)
        arrived = pair.step(x, step)
        assert torch.equal(arrived, silent.step(x, step))
        seen = ear.heard.pop()
        if seen.kind == "clear":  # few numbers go as they are, where a payload is not smaller
            assert torch.equal(arrived, x)
            assert torch.equal(seen.decompressed, x)
            continue
        compressed = x + before if memory == "error" else x - before
        if memory == "none" or step == 1:
            compressed = x
        assert_measured(seen, compressed, slack_of(compressor, seen))
        if memory == "difference":
            torch.testing.assert_close(arrived, before + seen.decompressed, rtol=0, atol=1e-12)
            before = arrived
        else:
            assert torch.equal(arrived, seen.decompressed)
            before = compressed - seen.decompressed
    assert ear.nbytes == pair.sender.sent


@pytest.mark.parametrize("compressor", DETERMINISTIC, ids=repr)
def test_of_samples_the_first_visit_is_in_clear(compressor: Any) -> None:
    pair = Pair(Link(compressor, memory="samples"))
    ear = Ear(pair)
    x = made((4, 6), F64, 1)
    pair.step(x, 1, ids=[5, 6, 7, 8])
    (seen,) = ear.heard
    assert torch.equal(seen.decompressed, x)
    assert_measured(seen, x)
    y = made((4, 6), F64, 2)
    arrived = pair.step(y, 2, ids=[6, 9, 8, 10])
    seen = ear.heard[1]
    assert torch.equal(seen.decompressed[[1, 3]], y[[1, 3]])
    torch.testing.assert_close(arrived[[0, 2]], x[[1, 3]] + seen.decompressed[[0, 2]])
    *coded, new = seen.measure(y)
    assert torch.equal(new, y[[1, 3]])
    assert len(coded) + 1 == len(seen.values)
    assert torch.equal(seen.values[-1], y[[1, 3]])


@pytest.mark.parametrize("per", ["sample", "microbatch"])
def test_reused_positions_are_known(per: Any) -> None:
    masks: list[Any] = [{}, {}]
    forwards = Pair(Link(TopK(density=0.3), per), masks)
    backwards = Pair(Link(TopK(density=0.3), per, reuse_mask=True), masks[::-1])
    ear = Ear(backwards)
    for step in (1, 2):
        forwards.step(made((3, 7), F64, step), step)
        gradient = made((3, 7), F64, step, 9)
        arrived = backwards.step(gradient, step)
    for seen, step in zip(ear.heard, (1, 2), strict=True):
        assert seen.kind == "entries"
        assert_measured(seen, made((3, 7), F64, step, 9))
    assert torch.equal(ear.heard[1].decompressed, arrived)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_what_is_not_compressed_is_seen_as_it_is(dtype: torch.dtype) -> None:
    pair = Pair(Link(None if dtype.is_floating_point else UniformQuantized(4)))
    ear, x = Ear(pair), made((3, 4), F64, 1).mul(3).to(dtype)
    pair.step(x)
    (seen,) = ear.heard
    assert (seen.kind, seen.values[0].dtype) == ("clear", dtype)
    assert torch.equal(seen.values[0], x)
    assert seen.measure(x)[0] is x


def test_what_is_not_finite_is_seen_as_nan() -> None:
    pair = Pair(Link(UniformQuantized(4)))
    ear = Ear(pair)
    pair.step(torch.tensor([[1.0, torch.inf, *[0.0] * 14]]))
    assert ear.heard[0].decompressed.isnan().all()


def test_a_link_has_no_averages() -> None:
    class Stage:
        """As much of one as is listened to."""

        def listen(self, listener: Any) -> Any:
            self.listener = listener
            return lambda: None

    from efsgd.algorithms.reading import Packet, in_clear

    stage, buffer = Stage(), torch.zeros(8, dtype=torch.uint8)
    with observe(stage) as recording:
        for step in (0, 0, 1):
            packet = Packet("activations", step, 3, torch.Size([8]), buffer, in_clear)
            stage.listener(packet)
    assert [(m.step, m.worker, len(m.parameters), m.nbytes) for m in recording] == [
        (0, 3, 2, 16),
        (1, 3, 1, 8),
    ]
    with pytest.raises(ValueError, match=r"no averages over a link. Use messages\(\)"):
        recording.averages()
