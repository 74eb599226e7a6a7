"""What PowerSGD sends in the runs of the Accordion paper at fixed ranks."""

import dataclasses
import math
from pathlib import Path

import pytest

from benchmarks.accordion_networks import shapes_of_network
from benchmarks.accordion_volumes import RUNS, Run, floats_per_step, million_floats, section

PAGE = Path(__file__).parents[2] / "docs" / "volumes.md"
# The paper prints one digit after the point, and cuts off some figures where it rounds others.
TOLERANCE = 0.1
# Factors of a 4×64 matrix at rank 4 have 272 numbers, 16 more than it has itself.
SENT_WHOLE_BY_DEFAULT = {("SENet", 4): 4 * 16}


def by_definition(run: Run) -> int:
    """Vectors as they are, and of each matrix [n, m] the factors P [n, r] and Q [m, r]."""
    floats = 0
    for shape in shapes_of_network(run.network, run.classes):
        n, m = shape[0], math.prod(shape[1:])
        floats += n if len(shape) == 1 else min(n, m, run.rank) * (n + m)
    return floats


def name(run: Run) -> str:
    return f"{run.label}, rank {run.rank}"


@pytest.mark.parametrize("run", RUNS, ids=name)
def test_buffers_of_a_step_give_the_published_volume_of_a_run(run: Run) -> None:
    floats = floats_per_step(run)
    assert floats == by_definition(run)
    assert abs(million_floats(run, floats) - run.published) <= TOLERANCE


@pytest.mark.parametrize("run", [run for run in RUNS if run.rank > 1], ids=name)
def test_the_default_leaves_only_matrices_as_they_are_whose_factors_are_larger(run: Run) -> None:
    saved = SENT_WHOLE_BY_DEFAULT.get((run.network, run.rank), 0)
    assert floats_per_step(run, min_compression_rate=1.0) == by_definition(run) - saved


def test_the_page_has_what_is_counted() -> None:
    assert section([by_definition(run) for run in RUNS]) in PAGE.read_text()


def test_no_other_length_of_a_run_gives_a_published_figure() -> None:
    for run in RUNS:
        floats = by_definition(run)
        runs = [dataclasses.replace(run, epochs=epochs) for epochs in range(1, 1000)]
        sent = {other.epochs: million_floats(other, floats) for other in runs}
        fitting = [each for each in sent if abs(sent[each] - run.published) <= TOLERANCE]
        assert fitting == [run.epochs]
