"""What is observed is what was sent, of the whole family; and nothing changes by it."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd import LQSGD, GradientAverager, PowerSGD, Signum, SpectralAtomo, UniformQuantized
from efsgd.algorithms.quantization.log_quantizer import LogQuantizer
from efsgd.audit import Message, Observed, Recording, observe
from efsgd.testing.strategies import Shape, seeds, shape_lists, world_sizes
from tests.audit.observed_runs import SHAPES, Team, assert_measured, error_feedback, normal
from tests.compressors.test_contract_suite import EVERY_COMPRESSOR
from tests.simulation import bits, snapshot
from tests.strategies import examples

STACKED = [PowerSGD(rank=2, batch_dims=1), LQSGD(rank=2, batch_dims=1), SpectralAtomo(batch_dims=1)]
COMPILED = [PowerSGD(rank=5, min_compression_rate=0.5)]  # columns of P one after the other
MAKERS: list[Callable[[list[Tensor]], Any]] = [
    *(error_feedback(each) for each in [*EVERY_COMPRESSOR, *STACKED, *COMPILED]),
    lambda parameters: Signum(parameters, lr=0.1),
    lambda parameters: GradientAverager(parameters, PowerSGD(rank=2)),
]
NAMES = [*map(repr, [*EVERY_COMPRESSOR, *STACKED, *COMPILED]), "Signum", "GradientAverager"]


def slack(compressor: Any, observed: Observed) -> list[float]:
    """What codes miss at most: half the distance of two codes, or a whole one if stochastic."""
    largest = [float(value.abs().max()) if value.numel() else 0.0 for value in observed.values]
    if isinstance(compressor, LQSGD) and observed.kind == "low rank":
        quantizer = LogQuantizer(compressor.bits, compressor.alpha)
        below = torch.tensor(1 - 1 / (2 * quantizer.levels), dtype=torch.float64)
        return [scale * (1 - float(quantizer.expand(below))) for scale in largest]
    if observed.kind != "codes" or not observed.values[0].numel():
        return []
    span = float(observed.values[0].max() - observed.values[0].min())
    if isinstance(compressor, UniformQuantized):
        share = 1.0 if compressor.stochastic else 0.5
        return [1.000001 * share * span / (2**compressor.bits - 1)]
    return [1.000001 * 0.5 * largest[0] / (2 ** (compressor.bits - 1) - 1)]


def assert_is_what_was_sent(team: Team, worker: int, message: Message) -> None:
    """To the byte, and to the bit what the worker made of it itself."""
    optimizer = team.optimizers[worker]
    assert (message.worker, message.applied) == (worker, True)
    assert message.nbytes == optimizer.communication_stats()["bytes_sent"]
    indices = [each.index for each in message.parameters]
    assert indices == list(range(len(team.deltas[worker])))
    for each, delta in zip(message.parameters, team.deltas[worker], strict=True):
        assert each.shape == each.decompressed.shape == delta.shape
        assert each.name == f"parameter {each.index}"
        # At a refresh PowerSGD+ sends the matrix, and what is made of it is less.
        expected = delta if each.kind == "clear" else team.own[worker][each.index]
        assert torch.equal(each.decompressed, expected)
        assert_measured(each, delta, slack(optimizer.compressor, each))


def run_observed(
    make: Callable[[list[Tensor]], Any],
    world_size: int,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    seed: int,
    steps: int = 3,
) -> None:
    """Trains two teams, one of them observed: they stay equal, and messages are what was sent."""
    start = normal(shapes, dtype, seed)
    observed, other = (Team(make, world_size, start) for _ in range(2))
    observed.keep_reconstructions()
    with observe(observed.optimizers) as recording:
        for step in range(steps):
            gradients = [normal(shapes, dtype, seed, step, w) for w in range(world_size)]
            for team in (observed, other):
                team.step(gradients)
            assert bits(observed.handed_over) == bits(other.handed_over)
            for worker in range(world_size):
                (message,) = recording.messages(worker=worker, step=step)
                assert_is_what_was_sent(observed, worker, message)
                assert bits(sent(recording, worker, step)) == bits(
                    observed.handed_over[worker][-len(sent(recording, worker, step)) :]
                )
    assert bits(snapshot(observed.optimizers)) == bits(snapshot(other.optimizers))
    assert recording.dropped == 0


def sent(recording: Recording, worker: int, step: int) -> list[Tensor]:
    """The copies themselves."""
    records = [each for each in recording._kept if (each.worker, each.step) == (worker, step)]
    return [buffer for record in records for part in record.parts for buffer in part.sent]


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
def test_messages_are_what_was_sent_and_nothing_changes(
    make: Callable[[list[Tensor]], Any], world_size: int
) -> None:
    run_observed(make, world_size, SHAPES, torch.float64, seed=0)


@examples(25)
@given(
    make=st.sampled_from(MAKERS),
    world_size=world_sizes(),
    shapes=shape_lists(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=seeds(),
)
def test_messages_are_what_was_sent_of_any_shapes(
    make: Callable[[list[Tensor]], Any],
    world_size: int,
    shapes: list[Shape],
    dtype: torch.dtype,
    seed: int,
) -> None:
    run_observed(make, world_size, shapes, dtype, seed, steps=2)
