"""What decisions of L-GreCo send."""

from typing import Any

import pytest

from efsgd.rank import LGreCo, Uniform
from efsgd.testing import Traced
from tests.rank.l_greco_runs import Shape, Workers, purposes

SHAPES: list[Shape] = [(16, 12), (9,), (12, 20), (10, 4, 3)]
OPTIONS: dict[str, Any] = {"lr": 0.01, "min_compression_rate": 0.0, "rank": 2}


def nbytes(trace: list[Traced], *words: str) -> int:
    return sum(each.nbytes for each in trace if any(word in each.purpose for word in words))


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_a_decision_by_power_iteration_sends_so_many_steps_of_the_greatest_rank(
    iterations: int,
) -> None:
    shapes: list[Shape] = [(16, 12), (12, 20), (10, 4, 3)]
    workers = Workers(lambda: LGreCo(2, iterations=iterations, sketch=100), 2, shapes, **OPTIONS)
    workers.steps(2)
    trace = workers.decide()
    factors = 4 * ((16 + 12) + (12 + 20) + (10 + 12))  # ranks are up to 4
    assert nbytes(trace, "P of acc", "Q of acc") == iterations * 8 * factors
    assert nbytes(trace, "sketches of acc") == 8 * 3 * 100
    greatest = Workers(lambda: Uniform(4), 2, shapes, **OPTIONS)
    greatest.step()
    assert nbytes(greatest.step(), "Alg. 1") >= 8 * factors  # control words ride along
    assert len(purposes(trace)) == 2 * iterations + 1


def test_layers_that_are_sent_whole_at_the_greatest_rank_send_no_more_in_a_decision() -> None:
    # Rank 3 of 16×4 has 60 numbers, less than 64; rank 4 would have 80.
    own = Workers(
        lambda: LGreCo(2, sketch=1, iterations=1), 2, [(16, 4)], lr=0.1, min_compression_rate=1.0
    )
    own.steps(2)
    assert nbytes(own.decide(), "P of acc", "Q of acc") == 8 * 3 * (16 + 4)


def test_a_decision_by_svd_sends_one_uncompressed_gradient() -> None:
    workers = Workers(lambda: LGreCo(2, spectrum="svd"), 2, SHAPES, **OPTIONS)
    workers.steps(2)
    trace = workers.decide()
    numbers = 16 * 12 + 12 * 20 + 10 * 12
    tails = 3 * (4 + 1)
    assert [each.nbytes for each in trace if "accumulated" in each.purpose] == [
        8 * numbers,
        8 * tails,
    ]
