"""The parts of the benchmark of rank changes that measure nothing."""

from collections.abc import Iterator
from itertools import count, pairwise
from typing import Any

import pytest
import torch

from benchmarks import rank
from benchmarks.rank_changes import LOW, Changes, Decisions, Watched, adding_all, optimizer_of
from benchmarks.tables import made_table
from benchmarks.timing import measure
from benchmarks.workloads import made_gradients
from efsgd import PowerSGDOptimizer
from efsgd.layout import matrix_shape

SHAPES = [(9, 8), (9,), (8, 3, 3), (9, 8)]


def ranks_of(optimizer: PowerSGDOptimizer) -> list[int]:
    """Of all matrices, as the factors have them."""
    states = [optimizer.state[p] for p in optimizer.param_groups[0]["params"]]
    return [state["q"].shape[-1] for state in states if "q" in state]


@pytest.mark.parametrize(("before", "after"), rank.CHANGES.values(), ids=list(rank.CHANGES))
def test_a_change_is_one_step_with_other_ranks(
    before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    gradients = made_gradients(SHAPES)
    optimizer = optimizer_of(gradients)
    changes = Changes(optimizer)
    runner = changes.runner(before, after)
    for _ in range(2):
        runner.prepare()
        steps = optimizer.communication_stats()["steps"]
        expected = [before[n % len(before)] for n in range(3)]
        assert ranks_of(optimizer) == expected
        runner.step()
        assert ranks_of(optimizer) == [after[n % len(after)] for n in range(3)]
        assert optimizer.communication_stats()["steps"] == steps + 1


def test_ordinary_steps_decide_nothing() -> None:
    optimizer = optimizer_of(made_gradients(SHAPES))
    runner = Changes(optimizer).runner((LOW,), (LOW,))
    runner.prepare()
    sent = optimizer.communication_stats()["decision_bytes_sent"]
    runner.step()
    assert ranks_of(optimizer) == [LOW] * 3
    assert optimizer.communication_stats()["decision_bytes_sent"] == sent


@pytest.mark.parametrize("with_errors", [False, True])
def test_an_observed_step_is_a_step_that_is_added(
    with_errors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = made_gradients(SHAPES)
    optimizer = optimizer_of(gradients)
    optimizer.step()
    watched = Watched(optimizer)
    accumulators = []
    make = watched._accumulator

    def noted(**options: Any) -> Any:
        accumulators.append(make(**options))
        return accumulators[-1]

    monkeypatch.setattr(watched, "_accumulator", noted)
    parameters = optimizer.param_groups[0]["params"]
    error = optimizer.state[parameters[0]]["error"].clone()
    watched.runner(with_errors=with_errors).step()
    expected = gradients[0] + error if with_errors else gradients[0]
    assert torch.equal(accumulators[0].sums[0], expected)
    optimizer.step()  # is not watched any more
    assert torch.equal(accumulators[0].sums[0], expected)
    alone = watched.adding(with_errors=with_errors)
    steps = optimizer.communication_stats()["steps"]
    alone.step()
    assert accumulators[1].sums[0].any()
    assert optimizer.communication_stats()["steps"] == steps


def test_a_decision_sends_sketches_and_what_is_decided() -> None:
    optimizer = optimizer_of(made_gradients(SHAPES))
    decisions = Decisions(optimizer)
    runner = decisions.runner()
    for _ in range(3):
        runner.prepare()
        runner.step()
    matrices = [matrix_shape(shape) for shape in SHAPES if len(shape) > 1]
    # No matrix here has more numbers than a sketch; then a flag, and two float64 for each.
    assert decisions.bytes_each == 4 * sum(n * m for n, m in matrices) + 8 * (1 + 2 * len(matrices))


def test_a_pass_leaves_gradients_as_they_are() -> None:
    gradients = made_gradients(SHAPES)
    runner = adding_all(gradients)
    given = [gradient.clone() for gradient in gradients]
    runner.step()
    assert all(torch.equal(own, like) for own, like in zip(gradients, given, strict=True))


def test_the_tables_are_ratios_to_ordinary_steps_and_to_passes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank, "show", lambda title, columns, rows: print(title, rows))
    runners, decisions = rank.runners_of(made_gradients(SHAPES))
    ticks: Iterator[int] = count()
    names = measure(runners, 1, warm_up=0, clock=lambda step: step() or float(next(ticks)))
    samples = {name: [2.0] for name in names} | {rank.PASS: [0.5]}
    for name in rank.CHANGES:
        samples[name] = [5.0]
    for name in samples:
        if name.startswith("a step that shows"):
            samples[name] = [3.0]
    found = {"workers": 1, "decision_bytes": decisions.bytes_each, "samples": samples}
    rank.report("resnet18", found)
    printed = capsys.readouterr().out
    # (5 - 2) / 2 of a change; 3 / 2, (3 - 2) / 0.5 and 2 / 0.5 of an observed step.
    assert printed.count("'1.5× (1.5 to 1.5)'") == len(rank.CHANGES) + 2
    assert printed.count("'2× (2 to 2)', '4× (4 to 4)'") == 2
    assert f"{decisions.bytes_each:,.0f} bytes" in printed


def test_an_allocation_is_made_for_each_round() -> None:
    assert rank.measure_allocation(2, layers=3, candidates=4).median > 0.0


def test_made_tables_are_of_decaying_spectra_and_depend_on_the_seed_alone() -> None:
    table = made_table(layers=20, candidates=40, seed=3)
    assert table == made_table(layers=20, candidates=40, seed=3)
    assert table != made_table(layers=20, candidates=40, seed=4)
    for layer in table:
        sides = layer[0].size  # of rank 1
        for multiple, (candidate, following) in enumerate(pairwise(layer), 1):
            assert candidate.size == min(multiple * sides, layer[-1].size)
            assert (candidate.error > following.error) == (candidate.size < following.size)
