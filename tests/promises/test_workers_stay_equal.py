"""Promises 3, 4 and 8: workers never drift, the wire schedule is fixed, bytes are counted."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.simulation import bits, make_workers, parameters_of, replicated, step_with
from tests.strategies import KINDS, Scenario, examples, scenarios


@examples(150)
@given(scenarios())
def test_workers_are_bitwise_equal_after_every_step(scenario: Scenario) -> None:
    workers = make_workers(scenario.parameters(), scenario.world_size, **scenario.hyperparameters)
    for step in range(scenario.steps):
        step_with(workers, scenario.gradients(step))
        first = replicated(workers[0])
        assert all(replicated(optimizer) == first for optimizer in workers[1:])


def test_errors_are_each_worker_s_own() -> None:
    scenario = Scenario([(9, 8)], 3, {}, 1, 0)
    workers = make_workers(scenario.parameters(), 3, lr=0.1, rank=1)
    step_with(workers, scenario.gradients(0))
    errors = [bits(optimizer.state[parameters_of(optimizer)[0]]["error"]) for optimizer in workers]
    assert len(set(map(str, errors))) == 3


SHAPES = [(9, 8), (8,), (9, 8), (), (4, 3, 3, 3)]


def trace_of(kind: str, missing: frozenset[tuple[int, int, int]], seed: int) -> list[object]:
    kinds = [kind] * len(SHAPES)
    scenario = Scenario(SHAPES, 3, {}, 2, seed, kinds, missing=missing)
    workers = make_workers(scenario.parameters(), 3, lr=0.1, rank=2, nonfinite="skip")
    step_with(workers, scenario.gradients(0))  # the first step compares the workers, too
    return list(step_with(workers, scenario.gradients(1)))


def test_the_schedule_does_not_depend_on_data_or_missing_gradients() -> None:
    everyone = frozenset((1, w, i) for w, i in itertools.product(range(3), range(len(SHAPES))))
    patterns = [frozenset(), frozenset({(1, 0, 0), (1, 2, 3)}), everyone]
    traces = [trace_of(kind, pattern, 1) for kind in KINDS for pattern in patterns]
    assert all(trace == traces[0] for trace in traces)
    assert len(traces[0]) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_schedule_does_not_depend_on_non_finite_gradients(value: float) -> None:
    expected = trace_of("gaussian", frozenset(), 1)
    scenario = Scenario(SHAPES, 3, {}, 2, 1)
    for index in range(len(SHAPES)):
        workers = make_workers(scenario.parameters(), 3, lr=0.1, rank=2, nonfinite="skip")
        step_with(workers, scenario.gradients(0))
        gradients = scenario.gradients(1)
        bad = gradients[1][index]
        assert bad is not None
        bad.reshape(-1)[-1:] = value
        assert step_with(workers, gradients) == expected


def test_bytes_are_those_of_the_buffers_handed_over() -> None:
    scenario = Scenario(SHAPES, 3, {}, 2, 1)
    workers = make_workers(
        [p.float() for p in scenario.parameters()], 3, lr=0.1, rank=2, min_compression_rate=1.0
    )
    totals = []
    for step in range(2):
        trace = step_with(workers, scenario.gradients(step))
        totals.append(sum(traced.nbytes for traced in trace))
    stats = workers[0].communication_stats()
    assert stats["bytes_sent"] == totals[1]
    assert stats["total_bytes_sent"] == sum(totals)
    assert stats["check_bytes_sent"] == totals[0] - totals[1] > 0
    assert stats["collectives"] == 2
    assert stats["steps"] == 2
    floats = sum(p.numel() for p in parameters_of(workers[0]))
    assert stats["bytes_uncompressed"] == 4 * floats
    assert stats["ratio"] == stats["bytes_uncompressed"] / stats["bytes_sent"]
    # (9, 8) twice at rank 2, vectors of 8 and 1, (4, 27) as a matrix; 5 + 3 control words.
    assert stats["bytes_sent"] == 4 * (2 * 2 * (9 + 8) + 8 + 1 + 2 * (4 + 27) + 5 + 3)


@examples(100)
@given(scenarios(), st.permutations([torch.float64, torch.float32, torch.bfloat16]))
def test_bytes_are_those_of_the_trace_in_every_step(
    scenario: Scenario, dtypes: list[torch.dtype]
) -> None:
    start = [p.to(dtypes[i % 3]) for i, p in enumerate(scenario.parameters())]
    workers = make_workers(start, scenario.world_size, **scenario.hyperparameters)
    total = of_checks = 0
    for step in range(scenario.steps):
        trace = step_with(workers, scenario.gradients(step))
        means = [traced.nbytes for traced in trace if traced.kind == "AllReduceMean"]
        total += sum(traced.nbytes for traced in trace)
        of_checks += sum(traced.nbytes for traced in trace if traced.kind == "AllGather")
        for optimizer in workers:
            stats = optimizer.communication_stats()
            assert (stats["collectives"], stats["bytes_sent"]) == (len(means), sum(means))
            assert (stats["total_bytes_sent"], stats["check_bytes_sent"]) == (total, of_checks)
            assert stats["bytes_uncompressed"] == sum(p.nbytes for p in start)


def test_only_vectors_need_one_collective() -> None:
    scenario = Scenario([(8,), ()], 2, {}, 2, 1)
    workers = make_workers(scenario.parameters(), 2, lr=0.1)
    step_with(workers, scenario.gradients(0))
    assert len(step_with(workers, scenario.gradients(1))) == 1
