"""Which messages are kept: of which steps and workers, how many, and also of steps that fail."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import efsgd
from benchmarks import trace_step
from efsgd import (
    LQSGD,
    CollectiveError,
    Identity,
    NonFiniteGradientError,
    PowerSGD,
    PowerSGDOptimizer,
    PowerSGDPlus,
    RandomBlock,
    RandomK,
    SignNorm,
    TopK,
)
from efsgd.algorithms.interfaces import Aggregator, Placement
from efsgd.algorithms.reading import Transcript
from efsgd.audit import observe
from efsgd.audit.recording import Recording
from efsgd.layout import Layout
from tests.audit.observed_runs import SHAPES, Team, assert_measured, error_feedback, normal
from tests.compressors.made_compressors import Mask, Signs
from tests.simulation import bits, snapshot

F64 = torch.float64
PACKAGE = Path(efsgd.__file__).parent


def gradients(world_size: int, step: int = 0) -> Any:
    return [normal(SHAPES, F64, step, worker) for worker in range(world_size)]


def team_of(compressor: Any, world_size: int = 2, **options: Any) -> Team:
    return Team(error_feedback(compressor, **options), world_size, normal(SHAPES, F64, 7))


# ---- averages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compressor",
    [
        Identity(),
        PowerSGD(rank=2),
        PowerSGD(rank=2, alternating=True),
        PowerSGDPlus(rank=2, refresh_every=2),
        RandomK(density=0.2),
        RandomBlock(density=0.2),
    ],
    ids=lambda each: type(each).__name__,
)
def test_averages_are_of_the_mean(compressor: Any) -> None:
    team = team_of(compressor, 3)
    with observe(team.optimizers) as recording:
        for step in range(3):
            team.step(gradients(3, step))
            (message,) = recording.averages(step=step)
            assert (message.step, message.worker, message.applied) == (step, None, True)
            assert message.nbytes == team.optimizers[0].communication_stats()["bytes_sent"]
            for each, *deltas in zip(message.parameters, *team.deltas, strict=True):
                mean = sum(deltas) / 3
                # The mean of rounded numbers is not the rounded mean.
                rounding = 8 * torch.finfo(F64).eps * max(1.0, float(mean.abs().sum()))
                assert_measured(each, mean, [rounding] * len(each.values))
    assert [message.step for message in recording.averages()] == [0, 1, 2]


def test_averages_of_a_step_are_those_that_all_apply() -> None:
    team = team_of(PowerSGD(rank=2), 3)
    before = [p.detach().clone() for p in team.optimizers[0].param_groups[0]["params"]]
    with observe(team.optimizers[2]) as recording:
        team.step(gradients(3))
    (message,) = recording.averages()
    after = team.optimizers[0].param_groups[0]["params"]
    for each, old, new in zip(message.parameters, before, after, strict=True):
        torch.testing.assert_close(old - each.decompressed, new.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("compressor", [TopK(density=0.1), SignNorm(), LQSGD(rank=2)], ids=repr)
def test_what_is_gathered_has_no_averages(compressor: Any) -> None:
    team = team_of(compressor)
    with observe(team.optimizers) as recording:
        team.step(gradients(2))
    with pytest.raises(ValueError, match=r"gathered.*Use messages\(\)"):
        recording.averages()


# ---- steps that are not applied -----------------------------------------------------------------


def test_skipped_steps_are_recorded_and_marked() -> None:
    team = team_of(PowerSGD(rank=2), nonfinite="skip")
    bad = gradients(2)
    bad[1][0][0, 0] = torch.nan
    with observe(team.optimizers) as recording:
        team.step(bad)
        team.step(gradients(2))
    first, of_nan, *others = recording.messages()
    assert [first.applied, of_nan.applied] == [False, False]
    assert [(each.step, each.worker, each.applied) for each in others] == [
        (0, 0, True),
        (0, 1, True),
    ]
    for each, gradient in zip(first.parameters, bad[0], strict=True):
        assert_measured(each, gradient)
    # What has met a NaN sends zeros; nothing else of this worker has been seen.
    assert all(not value.any() for each in of_nan.parameters for value in each.values)
    assert [message.applied for message in recording.averages()] == [False, True]


def test_a_step_that_raises_is_recorded() -> None:
    team = team_of(TopK(density=0.2))
    bad = gradients(2)
    bad[1][0][0, 0] = torch.inf
    with observe(team.optimizers) as recording, pytest.raises(NonFiniteGradientError):
        team.step(bad)
    assert [message.applied for message in recording] == [False, False]
    for each, gradient in zip(recording.messages(worker=0)[0].parameters, bad[0], strict=True):
        assert_measured(each, gradient)


@pytest.mark.parametrize(
    "compressor",
    [PowerSGD(rank=2), PowerSGD(rank=2, alternating=True), PowerSGDPlus(rank=2), TopK(density=0.1),
     RandomK(density=0.1), LQSGD(rank=2), LQSGD(rank=2, aggregation="scatter")],
    ids=repr,
)  # fmt: skip
def test_what_was_sent_before_a_failure_is_read(compressor: Any) -> None:
    number, is_over = 0, False
    team = team_of(compressor)
    team.step(gradients(2))  # what follows has no handshake before it
    while not is_over:
        with observe(team.optimizers) as recording:
            try:
                team.step(gradients(2, 1), fail_at=number)
                is_over = True
            except CollectiveError:
                number += 1
        for message in recording:
            assert message.applied == is_over
            assert message.nbytes <= team.optimizers[0].communication_stats()["bytes_sent"]
            for each in message.parameters:
                slack: list[float] = []
                if isinstance(compressor, LQSGD) and each.kind == "low rank":  # 8 bits, α = 10
                    slack = [0.02 * float(value.abs().max()) for value in each.values]
                assert_measured(each, team.deltas[message.worker or 0][each.index], slack)
    assert number == team.optimizers[0].communication_stats()["collectives"]


# ---- which are kept -----------------------------------------------------------------------------


def test_workers_and_steps_are_chosen() -> None:
    team = team_of(TopK(density=0.1), 3)
    with observe(team.optimizers, workers={0, 2}, steps=range(1, 3)) as recording:
        for step in range(4):
            team.step(gradients(3, step))
    found = [(message.step, message.worker) for message in recording]
    assert found == [(1, 0), (1, 2), (2, 0), (2, 2)]
    assert len(recording) == 4
    assert [message.step for message in recording.messages(worker=2)] == [1, 2]
    assert [message.worker for message in recording.messages(step=2)] == [0, 2]
    assert recording.messages(worker=1) == recording.messages(step=0) == []


def test_the_latest_are_kept_within_the_limit() -> None:
    team = team_of(PowerSGD(rank=2))
    with observe(team.optimizers, steps={0}) as recording:
        team.step(gradients(2))
    one_step = recording.nbytes
    sent = team.optimizers[0].communication_stats()["bytes_sent"]
    queries = sum(o["q"].nbytes for o in team.optimizers[0].state.values() if "q" in o)
    assert one_step == 2 * (2 * sent + queries)  # sent, answered, and known
    with observe(team.optimizers, max_bytes=3 * one_step // 2) as recording:
        for step in range(5):
            team.step(gradients(2, step))
            assert recording.nbytes <= recording.max_bytes
    found = [(message.step, message.worker) for message in recording]
    assert found == [(4, 1), (5, 0), (5, 1)]
    assert recording.dropped == 7


def test_what_is_larger_than_the_limit_is_not_kept() -> None:
    team = team_of(PowerSGD(rank=2), 1)
    with observe(team.optimizers, max_bytes=1) as recording:
        team.step(gradients(1))
    assert (recording.messages(), recording.nbytes, recording.dropped) == ([], 0, 1)


def test_several_buckets_are_one_message() -> None:
    def make(parameters: list[torch.Tensor]) -> Any:
        mixed = [p.detach().to(d).requires_grad_() for p, d in zip(parameters, kinds, strict=True)]
        return PowerSGDOptimizer(mixed, lr=1.0, momentum_form="sgd", rank=1)

    kinds = [F64, torch.float32, torch.bfloat16, F64]
    shapes = [(8, 6), (8, 6), (9, 5), (4,)]
    team = Team(make, 2, normal(shapes, F64, 1))
    with observe(team.optimizers) as recording:
        for step in range(2):
            team.step([normal(shapes, F64, step, worker) for worker in range(2)])
    for message in recording.messages(step=1):
        assert [each.index for each in message.parameters] == [0, 1, 2, 3]
        assert message.applied
        assert message.nbytes == team.optimizers[0].communication_stats()["bytes_sent"]
        for each, delta in zip(message.parameters, team.deltas[message.worker or 0], strict=True):
            assert_measured(each, delta)


def test_ranks_that_change_and_compression_that_starts_later() -> None:
    team = team_of(PowerSGD(rank=1), start_compressing_at=1)
    with observe(team.optimizers) as recording:
        for step in range(3):
            if step == 2:
                for optimizer in team.optimizers:
                    optimizer.param_groups[0]["rank"] = 3
            team.step(gradients(2, step))
    found = [message.parameters[0] for message in recording.messages(worker=1)]
    assert [each.kind for each in found] == ["clear", "low rank", "low rank"]
    assert [each.values[0].shape[-1] for each in found] == [10, 1, 3]


def test_missing_and_named_gradients() -> None:
    def make(parameters: list[torch.Tensor]) -> Any:
        named = zip(["weight", "bias"], parameters, strict=True)
        return PowerSGDOptimizer(named, lr=1.0, momentum_form="sgd", rank=1)

    team = Team(make, 2, normal([(8, 6), (8,)], F64, 1))
    made = [normal([(8, 6), (8,)], F64, worker) for worker in range(2)]
    with observe(team.optimizers) as recording:
        team.step([[made[0][0], None], made[1]])
    message = recording.messages(worker=0)[0]
    assert [each.name for each in message.parameters] == [
        "parameter 0 (weight)",
        "parameter 1 (bias)",
    ]
    assert not message.parameters[1].values[0].any()


# ---- others' compressors ------------------------------------------------------------------------


@pytest.mark.parametrize("compressor", [Mask(), Signs(), Signs(all_at_once=True)], ids=repr)
def test_compressors_of_ones_own_are_read_as_they_decompress(compressor: Any) -> None:
    team = team_of(compressor)
    team.keep_reconstructions()
    with observe(team.optimizers) as recording:
        team.step(gradients(2))
    for message in recording:
        for each in message.parameters:
            if each.kind != "clear":
                own = team.own[message.worker or 0][each.index]
                assert torch.equal(each.decompressed, own)
                assert torch.equal(each.values[0], own)
                assert each.measure(own)[0] is own or torch.equal(each.measure(own)[0], own)


def test_an_aggregator_that_cannot_be_read_says_so() -> None:
    aggregator = PowerSGD().aggregator(
        Layout.plan([]), PowerSGD().settings(), Placement(F64, torch.device("cpu"))
    )
    with pytest.raises(NotImplementedError, match=r"PowerIteration.*Define read"):
        Aggregator.read(aggregator, Transcript(0, [], [], []))


# ---- beginning and ending -----------------------------------------------------------------------


def test_nothing_is_left_when_it_is_closed() -> None:
    team = team_of(PowerSGD(rank=2))
    with observe(team.optimizers) as first, observe(team.optimizers[0]) as second:
        team.step(gradients(2))
        second.close()
        second.close()  # once more makes no difference
        team.step(gradients(2, 1))
    team.step(gradients(2, 2))
    assert [len(first), len(second)] == [4, 1]
    for optimizer in team.optimizers:
        assert (optimizer.engine.listeners, optimizer.watchers) == ([], ())


def test_steps_that_are_not_observed_make_no_other_calls() -> None:
    model = trace_step.four_tensors()
    runner = trace_step.efsgd_runner(model)
    optimizer = runner.step.__self__  # type: ignore[attr-defined]
    before = trace_step.traced(PACKAGE, runner)
    with observe(optimizer):
        assert trace_step.traced(PACKAGE, runner).total() > before.total()
    assert trace_step.traced(PACKAGE, runner) == before


def test_an_observed_optimizer_is_copied_without_its_observer() -> None:
    team = team_of(PowerSGD(rank=2), 1)
    with observe(team.optimizers) as recording:
        twin = copy.deepcopy(team.optimizers[0])
        assert twin.engine.listeners == []
        twin.step()
    assert len(recording) == 0


def test_what_cannot_be_copied_breaks_no_step() -> None:
    """Other workers wait for this one: memory that is missing is told of afterwards."""
    team, other = team_of(PowerSGD(rank=2)), team_of(PowerSGD(rank=2))
    with observe(team.optimizers[1]) as recording:
        with mock.patch.object(Recording, "_copy", side_effect=RuntimeError("out of memory")):
            team.step(gradients(2))
        other.step(gradients(2))
        assert bits(snapshot(team.optimizers)) == bits(snapshot(other.optimizers))
        for read in (recording.messages, recording.averages, lambda: list(recording)):
            with pytest.raises(RuntimeError, match=r"\(out of memory\).*fewer workers or steps"):
                read()


@pytest.mark.parametrize("wrong", [torch.optim.SGD([torch.zeros(1)]), None, torch.nn.Linear(1, 1)])
def test_what_exchanges_no_gradients_is_refused(wrong: Any) -> None:
    good = team_of(Identity(), 1).optimizers[0]
    with pytest.raises(TypeError, match=r"exchanges no gradients.*pass what it wraps"):
        observe([good, wrong])
    assert good.engine.listeners == []


@pytest.mark.parametrize("wrong", [0, -1, 1.5, None])
def test_limits_that_make_no_sense_are_refused(wrong: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="max_bytes"):
        observe(team_of(Identity(), 1).optimizers, max_bytes=wrong)
