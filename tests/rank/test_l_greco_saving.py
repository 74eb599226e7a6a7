"""L-GreCo goes on from checkpoints, also on another number of workers; and what decisions send."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from efsgd.checkpoint import consolidation
from efsgd.rank import Accordion, LGreCo, Uniform
from efsgd.testing import Traced, lockstep
from tests.rank.l_greco_runs import Shape, Workers, parameters_and_sums, purposes
from tests.simulation import bits, parameters_of

SHAPES: list[Shape] = [(16, 12), (9,), (12, 20), (10, 4, 3)]
OPTIONS: dict[str, Any] = {"lr": 0.01, "min_compression_rate": 0.0, "rank": 2}


def load_parameters_(workers: Workers, others: Workers) -> None:
    """Those of the others' worker 0, which are the same on all; and the number of steps."""
    for optimizer in workers.optimizers:
        pairs = zip(parameters_of(optimizer), parameters_of(others.optimizers[0]), strict=True)
        for own, theirs in pairs:
            own.data.copy_(theirs.data)
    workers.count = others.count


def resumed(workers: Workers, policies: Callable[[], LGreCo], **options: Any) -> Workers:
    """New workers that go on from what the others save."""
    found = Workers(policies, len(workers.optimizers), SHAPES, **options)
    for mine, theirs in (
        (found.optimizers, workers.optimizers),
        (found.schedulers, workers.schedulers),
    ):
        for own, other in zip(mine, theirs, strict=True):
            own.load_state_dict(copy.deepcopy(other.state_dict()))
    load_parameters_(found, workers)
    return found


@pytest.mark.parametrize("reference", [2, "accordion"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_training_goes_on_to_the_bit_from_the_middle_of_a_window(
    reference: Any, steps: int
) -> None:
    def policies() -> LGreCo:
        own = Accordion(1, 3, interval=2) if reference == "accordion" else reference
        return LGreCo(own, observations=2, interval=1 if steps else 2)

    through = Workers(policies, 2, SHAPES, **OPTIONS)
    for _ in range(3):  # then Accordion has gone over to the low rank, and is silent in the next
        through.steps(4)
        through.decide()
    through.steps(steps)
    stopped = resumed(through, policies, **OPTIONS)
    for workers in (through, stopped):
        workers.steps(4 - steps)
    assert bits(parameters_and_sums(stopped)) == bits(parameters_and_sums(through))
    for workers in (through, stopped):
        workers.decide()
        workers.steps(4)
    assert bits(parameters_and_sums(stopped)) == bits(parameters_and_sums(through))
    for workers in (through, stopped):
        workers.decide()
    assert stopped.values == through.values


@pytest.mark.parametrize("count", [1, 2, 4])
def test_another_number_of_workers_goes_on_with_the_mean_of_the_sums(count: int) -> None:
    def policies() -> LGreCo:
        return LGreCo(2, spectrum="svd", observations=3)

    before = Workers(policies, 3, SHAPES, **OPTIONS)
    before.steps(4)
    before.decide()
    before.steps(3)
    after = Workers(policies, count, SHAPES, **OPTIONS)
    saved = lockstep([consolidation(each) for each in before.optimizers]).results[0]
    exchanges = [each.consolidation(3, worker) for worker, each in enumerate(before.schedulers)]
    dicts = lockstep(exchanges).results
    assert bits(dicts) == bits([dicts[0]] * 3)
    for optimizer, scheduler in zip(after.optimizers, after.schedulers, strict=True):
        optimizer.load_state_dict(copy.deepcopy(saved))
        scheduler.load_state_dict(copy.deepcopy(dicts[0]))
    load_parameters_(after, before)
    for sums in after.sums:
        for index, found in sums.items():
            mean = torch.stack([own[index] for own in before.sums]).mean(0)
            # Three numbers added up, once divided and once multiplied by a third.
            assert torch.allclose(found, mean, rtol=1e-14, atol=1e-14)
    for workers in (before, after):
        workers.decide()
    assert after.values == before.values != [2, 2, 2]


# ---- bytes --------------------------------------------------------------------------------------


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
