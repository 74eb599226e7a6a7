"""What happens when a compressor raises on one worker, or gives what is not finite."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from efsgd import (
    ErrorFeedbackSGD,
    Field,
    NonFiniteGradientError,
    PowerSGD,
    SpectralAtomo,
    TensorCompressor,
    TopK,
    WorkerMismatchError,
)
from efsgd.algorithms.low_rank.products import LowRank
from efsgd.algorithms.operators import Payload
from efsgd.randomness import Draws
from efsgd.testing import LockstepError
from tests.compressors.made_compressors import Signs, make_workers
from tests.simulation import bits, parameters_of, snapshot, step_with
from tests.strategies import Gradients, gaussian


def gradients(step: int, world_size: int = 2) -> Gradients:
    return [[gaussian((6, 5), worker, step)] for worker in range(world_size)]


@dataclasses.dataclass(frozen=True)
class RaisesInLineNine(Signs):
    """Raises when a tensor of large elements is decompressed for the errors."""

    def add_decompressed_(self, out: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        if alpha < 0 and float(payload[1]) > 50:
            raise MemoryError("line 9")
        super().add_decompressed_(out, payload, draws, alpha)


def test_an_error_in_line_9_is_an_error_on_all_workers() -> None:
    workers = make_workers([torch.zeros(6, 5)], 2, RaisesInLineNine())
    good = gradients(0)
    step_with(workers, good)
    before, large = snapshot(workers), gaussian((6, 5), 2) * 1000
    with pytest.raises(Exception) as caught:
        step_with(workers, [[large], good[1]])
    assert isinstance(caught.value, MemoryError)
    assert any("CollectiveError" in note for note in caught.value.__notes__)
    assert bits(snapshot(workers)) == bits(before)
    step_with(workers, good)


@pytest.mark.parametrize("alternating", [False, True])
def test_after_an_error_past_the_last_word_workers_do_not_drift_unnoticed(
    alternating: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor = PowerSGD(2, 0.0, alternating=alternating)
    workers = make_workers([torch.zeros(6, 5)], 2, compressor)
    for step in range(3):
        step_with(workers, gradients(step))
    subtract, calls = LowRank.subtract_from_, []

    def fails_once(self: LowRank, blocks: Any) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise MemoryError("line 9, with Q in flight")
        subtract(self, blocks)

    with monkeypatch.context() as context:
        context.setattr(LowRank, "subtract_from_", fails_once)
        # In lockstep the others are seen to go on; between processes they just do.
        with pytest.raises(LockstepError, match="line 9"):
            step_with(workers, gradients(3))
    # What worker 1 has done meanwhile: it has the answer of a collective that worker 0 left.
    lonely = make_workers([torch.zeros(6, 5)], 2, compressor)
    for step in range(4):
        step_with(lonely, gradients(step))
    workers[1] = lonely[1]
    for _ in range(2):
        with pytest.raises(WorkerMismatchError, match="worker 0: step=3"):
            step_with(workers, gradients(4))


@dataclasses.dataclass(frozen=True)
class Narrow(TensorCompressor):
    """Sends everything in half precision, where large numbers are infinite."""

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        return (Field(shape.numel(), torch.float16),)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return (delta.flatten().half(),)

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return payload[0].view(shape)


@pytest.mark.parametrize(
    ("compressor", "scale"), [(Narrow(), 1e6), (SpectralAtomo(2), 1e38)], ids=["narrow", "atomo"]
)
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_mean_that_is_not_finite_is_refused_by_all(
    compressor: Any, scale: float, nonfinite: str
) -> None:
    options = {"nonfinite": nonfinite, "error_feedback": False}
    workers = make_workers([torch.zeros(6, 5)], 2, compressor, **options)
    step_with(workers, gradients(0))
    before = snapshot(workers)
    large = [[own[0].float() * scale] for own in gradients(1)]
    if nonfinite == "raise":
        with pytest.raises(NonFiniteGradientError, match="their mean overflows"):
            step_with(workers, large)
    else:
        step_with(workers, large)
        assert workers[0].communication_stats()["skipped_steps"] == 1
    assert bits(snapshot(workers)) == bits(before)
    step_with(workers, gradients(2))
    assert all(bool(p.isfinite().all()) for p in parameters_of(workers[1]))


def test_a_tensor_that_is_not_compressed_any_more_keeps_no_other_s_memory() -> None:
    own = [torch.zeros(300, 100, requires_grad=True), torch.zeros(10, 10, requires_grad=True)]
    groups = [{"params": own[:1]}, {"params": own[1:]}]
    optimizer = ErrorFeedbackSGD(groups, lr=0.1, compressor=TopK(density=0.1))
    for p in own:
        p.grad = gaussian(tuple(p.shape), 1).float()
    optimizer.step()
    optimizer.param_groups[1]["density"] = 1.0
    for _ in range(2):
        optimizer.step()
    assert optimizer.state[own[1]]["error"].untyped_storage().nbytes() == 4 * 100
    assert not optimizer.state[own[1]]["error"].any()


@pytest.mark.parametrize("count", [3, 300])
def test_a_change_is_announced_whatever_the_default_dtype(count: int) -> None:
    parameters = [torch.zeros(2, 2, device="cpu", dtype=torch.float32) for _ in range(count)]
    workers = make_workers(parameters, 2, PowerSGD(1, 0.0))
    made = [[gaussian((2, 2), w, i) for i in range(count)] for w in range(2)]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        step_with(workers, made)
        workers[1].param_groups[0]["min_compression_rate"] = 0.5
        with pytest.raises(WorkerMismatchError, match="min_compression_rate"):
            step_with(workers, made)
    finally:
        torch.set_default_dtype(default)
