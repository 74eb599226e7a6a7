"""A budget of bytes is kept, to the byte, and used as far as it goes."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efsgd import LQSGD, PowerSGD, TopK, UniformQuantized
from efsgd.algorithms.interfaces import Compressor
from efsgd.rank import CommunicationBudget, RankScheduler
from efsgd.rank.fitting import largest_within
from efsgd.testing.strategies import Shape, matrix_shapes, shape_lists
from tests.rank.made_time import MadeWorkers, optimizers
from tests.simulation import parameters_of

SHAPES: list[Shape] = [(24, 16), (16,), (12, 3, 3, 2), (24, 16), (40, 30)]
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.bfloat16]

KINDS: dict[str, tuple[Any, str, list[float]]] = {
    "PowerSGD": (PowerSGD(), "rank", list(range(1, 13))),
    "PowerSGD, all matrices": (PowerSGD(min_compression_rate=0.0), "rank", list(range(1, 13))),
    "LQSGD": (LQSGD(bits=3), "rank", list(range(1, 13))),
    "LQSGD, scattered": (LQSGD(aggregation="scatter"), "rank", [1, 2, 4, 8]),
    "TopK": (TopK(density=0.1), "density", [0.01, 0.02, 0.1, 0.3, 1.0]),
    "TopK, all together": (
        TopK(density=0.1, scope="model"),
        "density",
        [0.01, 0.02, 0.1, 0.3],
    ),
    "UniformQuantized": (UniformQuantized(), "bits", [1, 2, 3, 4, 7, 16]),
}


def with_budget(budget: int, world_size: int = 1, **options: Any) -> MadeWorkers:
    made = optimizers(SHAPES, world_size, PowerSGD(**options))
    return MadeWorkers(made, lambda clock: CommunicationBudget(bytes_per_step=budget))


def sent(compressor: Compressor, shapes: list[Shape], world_size: int, **options: Any) -> int:
    """What the buffers of a step have."""
    return MadeWorkers(optimizers(shapes, world_size, compressor, **options)).train(1)[0]


def chosen(workers: MadeWorkers, setting: str = "rank") -> list[Any]:
    """The values that are set for single parameters, the same on all workers."""
    own = [group["per_parameter"] for o in workers.optimizers for group in o.param_groups]
    assert own == [own[0]] * len(own)
    return [value for value in own[0][setting] if value is not None]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=5)
def test_the_budget_is_kept_and_the_next_uniform_value_would_exceed_it(
    kind: str, data: st.DataObject
) -> None:
    compressor, setting, values = KINDS[kind]
    shapes = [*data.draw(shape_lists(4)), (7, 9), data.draw(matrix_shapes())]
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=6, max_size=6))
    options = {"world_size": data.draw(st.sampled_from([1, 3])), "dtypes": dtypes[: len(shapes)]}

    def cost(value: float) -> int:
        return sent(dataclasses.replace(compressor, **{setting: value}), shapes, **options)

    # Until the first decision one worker is counted on, which may cost more than several.
    smallest = dataclasses.replace(compressor, **{setting: values[0]})
    alone = sent(smallest, shapes, 1, dtypes=list(options["dtypes"]))
    least, most = max(alone, cost(values[0])), cost(values[-1])
    budget = data.draw(st.integers(least, max(least, most) + 50))
    workers = MadeWorkers(
        optimizers(shapes, compressor=compressor, **options),
        lambda clock: CommunicationBudget(bytes_per_step=budget, values=values, setting=setting),
    )
    first = workers.train(1)[0]  # of several workers nobody has known until now
    workers.decide()
    # What is scattered has a row for each worker, with two scales of each matrix at most. Ranks are
    # counted one by one, and their rows may have fewer.
    is_scattered = getattr(compressor, "aggregation", "gather") == "scatter"
    slack = 2 * 8 * len(shapes) * options["world_size"] if is_scattered else 0
    assert workers.train(1)[0] <= budget + slack
    uniform = values.index(min(chosen(workers, setting)))
    if uniform + 1 < len(values):
        assert cost(values[uniform + 1]) > budget
    if options["world_size"] == 1:
        assert first <= budget + slack


def test_the_budget_of_a_uniform_rank_gives_it_to_all_and_one_byte_less_does_not() -> None:
    for rank in range(1, 10):
        budget = sent(PowerSGD(rank=rank), SHAPES, 1)
        for less in (0, 1) if rank > 1 else (0,):
            workers = with_budget(budget - less)
            assert min(chosen(workers)) == rank - less
            assert (chosen(workers) == [rank] * 4) == (less == 0)
            assert workers.train(1)[0] <= budget - less


def test_what_is_left_goes_to_the_layers_that_cost_least() -> None:
    # A rank more costs 160, 120, 160 and 280 bytes; rank 2 leaves 330 of them.
    budget = sent(PowerSGD(rank=2), SHAPES, 1) + 330
    workers = with_budget(budget)
    assert chosen(workers) == [3, 3, 2, 2]


def test_alternating_steps_keep_the_budget_in_the_mean() -> None:
    for budget in (3000, 4001, 7777):
        workers = with_budget(budget, alternating=True)
        left, right = workers.train(2)
        assert left != right and left + right <= 2 * budget
        larger = min(chosen(workers)) + 1
        two = MadeWorkers(optimizers(SHAPES, 1, PowerSGD(rank=larger, alternating=True))).train(2)
        assert sum(two) > 2 * budget


def test_too_small_a_budget_is_refused_with_what_it_must_be() -> None:
    least = sent(PowerSGD(rank=1), SHAPES, 1)
    fixed = 4 * (16 + len(SHAPES) + 1)
    text = (
        f"Invalid bytes_per_step: {least - 1}. With rank=1 a step sends {least} bytes, {fixed} of "
        f"them in parameters that are never compressed and in control words. Must be at least "
        f"{least}; or give smaller values."
    )
    (optimizer,) = optimizers(SHAPES, 1, PowerSGD())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError) as caught:
        RankScheduler(optimizer, CommunicationBudget(bytes_per_step=least - 1))
    assert str(caught.value) == text
    assert optimizer.state_dict()["param_groups"] == before["param_groups"]
    RankScheduler(optimizer, CommunicationBudget(bytes_per_step=least))


def test_frozen_and_added_parameters_change_what_fits() -> None:
    budget = sent(PowerSGD(rank=4), SHAPES, 1)
    workers = with_budget(budget)
    assert chosen(workers) == [4] * 4
    (optimizer,) = workers.optimizers
    parameters_of(optimizer)[4].requires_grad_(False)
    workers.window(1)
    assert chosen(workers)[-1] == 4  # it keeps its own
    assert min(chosen(workers)[:-1]) > 4
    assert 0.9 * budget < workers.train(1)[0] <= budget
    optimizer.add_param_group({"params": [torch.zeros(30, 30, requires_grad=True)]})
    parameters_of(optimizer)[4].requires_grad_(True)
    workers.window(1)
    assert workers.train(1)[0] <= budget
    assert optimizer.param_groups[1]["per_parameter"]["rank"][0] < 4


def test_sparse_gradients_count_in_full_once_they_are_known() -> None:
    shapes: list[Shape] = [(24, 16), (200, 8)]
    (optimizer,) = optimizers(shapes, 1, PowerSGD())
    budget = 4 * 200 * 8 + 4 * 3 + 4 * 2 * 40  # leaves rank 2 for the other
    scheduler = RankScheduler(optimizer, CommunicationBudget(bytes_per_step=budget))
    dense, embedding = optimizer.param_groups[0]["params"]
    for _ in range(2):
        dense.grad = torch.randn(24, 16)
        embedding.grad = torch.ones(200, 8).to_sparse()
        optimizer.step()
        scheduler.step()
    dense.grad, embedding.grad = torch.randn(24, 16), torch.ones(200, 8).to_sparse()
    optimizer.step()
    assert optimizer.communication_stats()["bytes_sent"] == budget
    assert scheduler.get_last_ranks()["parameter 0"] == 2


def test_a_budget_that_has_become_too_small_takes_the_smallest_value_and_says_so_once() -> None:
    budget = sent(PowerSGD(rank=1), SHAPES, 1) + 10
    workers = with_budget(budget)
    workers.optimizers[0].add_param_group({"params": [torch.zeros(90, 90, requires_grad=True)]})
    workers.train(1)
    with pytest.warns(UserWarning, match=rf"With rank=1 .*more than bytes_per_step={budget}"):
        workers.decide()
    assert workers.ranks() == [[1] * 5]
    workers.window(1)  # a second warning would be an error here


def test_decisions_in_bytes_send_nothing_but_what_every_decision_does() -> None:
    workers = with_budget(5000, 2)
    workers.train(1)
    purposes = [traced.purpose for traced in workers.decide().trace]
    assert purposes == ["digests of settings, parameters and state", "decisions"]


def test_the_policy_goes_on_from_a_state_dict() -> None:
    workers = with_budget(5000)
    workers.window(1)
    saved = workers.schedulers[0].state_dict()
    others = with_budget(9000)
    others.schedulers[0].load_state_dict(saved)
    assert others.ranks() == workers.ranks()
    assert saved["policy"] == {"windows": 1} == others.schedulers[0].policy.state_dict()


def test_values_in_order_of_descending_cost_are_refused() -> None:
    policy = CommunicationBudget(bytes_per_step=10**6, values=[4, 2, 1])
    with pytest.raises(ValueError, match=r"Invalid values: \(4, 2, 1\). Must be in order of asc"):
        RankScheduler(optimizers(SHAPES, 1, PowerSGD())[0], policy)


# ---- the solver ---------------------------------------------------------------------------------

tables = st.lists(st.lists(st.integers(0, 20), min_size=4, max_size=4), min_size=1, max_size=4)


@given(table=tables, limit=st.integers(0, 90))
def test_the_largest_uniform_value_within_the_limit_is_chosen_and_the_cheapest_raised(
    table: list[list[int]], limit: int
) -> None:
    table = [sorted(row) for row in table]
    values = (1, 2, 3, 4)

    def total(chosen: Any) -> int:
        return sum(row[value - 1] for row, value in zip(table, chosen, strict=True))

    chosen = largest_within(values, table, total, limit)
    uniform = [value for value in values if total([value] * len(table)) <= limit]
    if chosen is None:
        assert not uniform
        return
    first = uniform[-1]
    assert total(chosen) <= limit
    raises = {}
    for layer, row in enumerate(table):
        higher = [value for value in values[first:] if row[value - 1] > row[first - 1]]
        assert chosen[layer] in (first, *higher[:1])
        if higher:
            raises[layer] = row[higher[0] - 1] - row[first - 1]
    taken = [layer for layer in raises if chosen[layer] != first]
    left = [layer for layer in raises if chosen[layer] == first]
    if left:  # the cheapest of the others would exceed the limit
        cheapest = min(left, key=lambda layer: (raises[layer], layer))
        assert total(chosen) + raises[cheapest] > limit
        assert all((raises[layer], layer) < (raises[cheapest], cheapest) for layer in taken)


def test_the_total_counts_and_not_the_sum() -> None:
    table = [[0, 1], [0, 2], [0, 3]]

    def total(chosen: Any) -> float:  # two raised layers cost one more together
        raised = [layer for layer, value in enumerate(chosen) if value == 2]
        return sum(table[layer][1] for layer in raised) + (1 if len(raised) > 1 else 0)

    assert largest_within((1, 2), table, total, 3) == [2, 1, 1]
