"""A stack of matrices has one rank: its bytes and errors are those of all its matrices."""

import math
from typing import Any

import pytest
import torch

from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    PowerSGD,
    PowerSGDOptimizer,
    PowerSGDPlus,
    SpectralAtomo,
)
from efsgd.engine.parameters import list_parameters
from efsgd.rank import Accordion, CommunicationBudget, LGreCo, Uniform
from efsgd.rank.accumulation import Accumulator
from efsgd.rank.approximation.tables import ErrorTables
from efsgd.rank.costs.objectives import compression_seconds
from efsgd.rank.costs.volumes import byte_table, total_bytes
from efsgd.rank.layers import Layer, layers_of
from efsgd.testing import lockstep
from efsgd.wire.collectives import run
from efsgd.wire.transports import Alone
from tests.rank.l_greco_runs import Workers, low_rank_error, mean_of
from tests.rank.made_time import MadeClock
from tests.rank.rank_runs import Team
from tests.stacks import Twins
from tests.strategies import gaussian

FAMILY: list[Any] = [
    PowerSGD,
    PowerSGDPlus,
    LQSGD,
    lambda **options: LQSGD(aggregation="scatter", **options),
    SpectralAtomo,
]
RANKS = (1, 2, 3, 5, 40)
STACKS = [((), (10,)), ((3,), (12, 10)), ((2, 2), (6, 14)), ((), (12, 10))]


def layers_of_twins(compressor: Any) -> tuple[list[Layer], list[Layer]]:
    """Of an optimizer with stacks, and of one with separate parameters."""
    twins = Twins(STACKS, compressor, 1, dtype=torch.float64)
    found = []
    for own in (twins.stacked[0], twins.separate[0]):
        infos, groups = list_parameters(own.param_groups), own.param_groups
        found.append(layers_of(infos, groups, compressor, "rank", RANKS, own))
    stacked, separate = found
    return stacked, separate


@pytest.mark.parametrize("make", FAMILY)
def test_it_sends_what_its_matrices_send(make: Any) -> None:
    for rank in RANKS:
        for step in (0, 1):
            options = torch.float64, step, 3
            stacked = make(rank=rank, batch_dims=2).payload_bytes([(2, 3, 12, 10)], *options)
            assert stacked == make(rank=rank).payload_bytes([(12, 10)] * 6, *options)


@pytest.mark.parametrize("make", FAMILY[:3])
def test_tables_of_bytes_have_it_once_for_each_matrix(make: Any) -> None:
    compressor = make(min_compression_rate=0.0)
    stacked, separate = layers_of_twins(compressor)
    assert [layer.name for layer in stacked] == ["parameter 1", "parameter 2", "parameter 3"]
    for rank in RANKS:
        assert total_bytes(compressor, stacked, "rank", [rank] * 3) == total_bytes(
            compressor, separate, "rank", [rank] * 8
        )
    if make is not LQSGD:  # whose codes share bytes
        rows = byte_table(compressor, separate, "rank", RANKS)
        expected = [[3 * each for each in rows[0]], [4 * each for each in rows[3]], rows[7]]
        assert byte_table(compressor, stacked, "rank", RANKS) == expected


def measured(
    compressor: Any, layers: list[Layer], sums: list[torch.Tensor], **options: Any
) -> list[list[float]]:
    """The table of two workers, one of whom has these sums, in the layers' order."""
    exchanges = []
    for worker in range(2):
        accumulator = Accumulator(with_errors=False)
        accumulator.begin(layers)
        for layer, own in zip(layers, sums, strict=True):
            accumulator.sums[layer.index].copy_(own + worker * own.flip(-1))
        tables = ErrorTables("rank", RANKS, **options)
        exchanges.append(tables.measure(compressor, layers, accumulator, 2, worker))
    found = lockstep(exchanges).results
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"sketch": 20}, {"spectrum": "svd"}, {"gradients": "worker 0"}],
    ids=str,
)
@pytest.mark.parametrize("make", [PowerSGD, LQSGD, SpectralAtomo])
def test_tables_of_errors_have_the_sum_of_its_matrices(make: Any, options: Any) -> None:
    compressor = make() if make is SpectralAtomo else make(min_compression_rate=0.0)
    stacked, separate = layers_of_twins(compressor)
    sums = [gaussian(layer.shape, 5, layer.index) for layer in stacked]
    pairs = zip(stacked, sums, strict=True)
    apart = [own[each.place] for layer, own in pairs for each in layer.matrices()]
    rows = iter(measured(compressor, separate, apart, **options))
    for layer, row in zip(stacked, measured(compressor, stacked, sums, **options), strict=True):
        own = [next(rows) for _ in layer.matrices()]
        expected = [sum(column) for column in zip(*own, strict=True)]
        # What is tried is summed before the mean over the workers is taken, and rounded there.
        tolerance = 1e-14 if make is SpectralAtomo else 0.0
        assert row == pytest.approx(expected, rel=tolerance, abs=0.0)


def test_compression_is_timed_for_all_its_matrices() -> None:
    clock = MadeClock()
    stacked, _ = layers_of_twins(PowerSGD(rank=2))
    options = PowerSGD(rank=2), stacked, "rank", RANKS
    found = run(compression_seconds(*options, repeats=1, clock=clock), Alone())
    assert found == [[0.0] * len(RANKS)] * len(stacked)  # no time passes by that clock


def test_a_budget_of_bytes_is_kept() -> None:
    budget = 8 * 4 * 3 * (24 + 16) + 100  # three columns of each of four matrices, and the words
    team = Team(lambda: CommunicationBudget(bytes_per_step=budget), 1, [(4, 24, 16)], batch_dims=1)
    assert team.values == [3]
    sent = sum(traced.nbytes for traced in team.step_alike(1.0))
    assert sent == 8 * 4 * 3 * (24 + 16) + 8 * 2 <= budget


def test_l_greco_gives_stacks_less_at_no_more_error() -> None:
    """The law of `LGreCo`, where an expert of a stack counts as a layer of its own."""
    shapes = [(3, 16, 12), (12, 20), (2, 10, 12)]
    own = {"batch_dims": (1, 0, 1)}

    class Stacks(Workers):
        def groups(self, parameters: list[torch.Tensor]) -> list[Any]:
            return [{"params": parameters, "per_parameter": own}]

    teams = [
        Stacks(policy, 2, shapes, PowerSGDOptimizer, min_compression_rate=0.0)
        for policy in (lambda: LGreCo(2, spectrum="svd"), lambda: Uniform(2))
    ]
    for team in teams:
        team.window(3)
    greco, uniform = teams
    means = mean_of(greco.summed(3))  # of the window that was decided on
    assert greco.values != uniform.values
    assert greco.sent() <= uniform.sent()

    def total(ranks: list[Any]) -> float:
        return math.fsum(
            low_rank_error(matrix, rank)
            for mean, rank, count in zip(means, ranks, own["batch_dims"], strict=True)
            for matrix in (mean if count else [mean])
        )

    # As in tests/rank/test_l_greco.py: singular values come from a float64 Gram matrix.
    assert total(greco.values) <= (1 + 1e-9) * total(uniform.values)


def test_accordion_decides_for_a_stack_as_one_layer() -> None:
    team = Team(lambda: Accordion(1, 3, interval=1), 2, [(3, 16, 16)], batch_dims=1)
    for norm, rank in ((1.0, 3), (1.1, 1), (5.0, 3)):
        assert team.window_alike(norm) == [rank]
    team.step_alike(1.0)
    [parameter] = team.optimizers[0].param_groups[0]["params"]
    assert team.optimizers[0].state[parameter]["q"].shape == (3, 16, 3)
    assert team.values == [3]


def test_ranks_are_no_larger_than_a_matrix() -> None:
    team = Team(lambda: Uniform(40), 1, [(3, 16, 12)], batch_dims=1, min_compression_rate=0.0)
    assert team.values == [12]


def test_error_feedback_sgd_has_it_too() -> None:
    weight = torch.zeros(3, 12, 10, requires_grad=True)
    optimizer = ErrorFeedbackSGD([weight], 0.1, compressor=LQSGD(rank=2, batch_dims=1))
    assert optimizer.state[weight]["q"].shape == (3, 10, 2)
