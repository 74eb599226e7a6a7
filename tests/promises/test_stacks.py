"""A stack of matrices trains and is compressed as its matrices by themselves are: the same bits."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from efsgd import LQSGD, PowerSGD, PowerSGDOptimizer, PowerSGDPlus, SpectralAtomo
from efsgd.algorithms.low_rank import products
from efsgd.algorithms.low_rank.fusion import Fusion
from efsgd.algorithms.low_rank.products import LowRank
from efsgd.compressors import Compressor
from efsgd.layout import Blocks, Entry, Layout
from tests.simulation import parameters_of
from tests.stacks import Stack, Twins
from tests.strategies import gaussian, seeds, sgd_hyperparameters

CPU = torch.device("cpu")

COMPRESSORS: list[Callable[..., Compressor]] = [
    partial(PowerSGD, rank=2),
    partial(PowerSGD, rank=3, min_compression_rate=0.0),
    partial(PowerSGD, rank=2, warm_start=False),
    partial(PowerSGD, rank=2, alternating=True),
    partial(PowerSGD, rank=1, alternating=True, warm_start=False),
    partial(PowerSGDPlus, rank=2, refresh_every=2),
    partial(PowerSGDPlus, rank=2, refresh_every=3, svd="randomized"),
    partial(PowerSGDPlus, rank=1, refresh_every=2, svd="randomized", refresh_update="exact"),
    partial(LQSGD, rank=2),
    partial(LQSGD, rank=2, bits=4, aggregation="scatter"),
    partial(SpectralAtomo, rank=2),
    partial(SpectralAtomo, rank=1, sampling="rejection"),
]

_counts = st.sampled_from([(), (1,), (3,), (2, 2)])
_shapes = st.sampled_from([(12, 10), (5, 16), (6, 3, 2, 2), (7,), (12, 10), ()])


@st.composite
def sgd_options(draw: st.DrawFn) -> dict[str, Any]:
    """Either form of momentum, with all that goes with it."""
    options = draw(sgd_hyperparameters()) | {
        "momentum_form": draw(st.sampled_from(["paper", "sgd"]))
    }
    if options["momentum_form"] == "paper":
        options |= {"nesterov": False, "dampening": 0.0}
    return options


@settings(max_examples=20)
@given(
    stacks=st.lists(st.tuples(_counts, _shapes), min_size=1, max_size=4),
    make=st.sampled_from(COMPRESSORS),
    world_size=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    transposed=st.booleans(),
    options=sgd_options(),
    start=st.sampled_from([0, 0, 2]),
    missing=st.frozensets(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 3)), max_size=6
    ),
    seed=seeds(),
)
def test_a_stack_has_the_bits_of_separate_parameters(
    stacks: list[Stack],
    make: Callable[..., Compressor],
    world_size: int,
    dtype: torch.dtype,
    transposed: bool,
    options: dict[str, Any],
    start: int,
    missing: frozenset[tuple[int, int, int]],
    seed: int,
) -> None:
    compressor = make(seed=seed)
    if dtype == torch.bfloat16:  # of other sizes, what is not compressed has other roundings there
        stacks, start = [(counts if len(own) > 1 else (), own) for counts, own in stacks], 0
    twins = Twins(
        stacks,
        compressor,
        world_size,
        dtype=dtype,
        transposed=transposed,
        seed=seed,
        start_compressing_at=start,
        error_feedback=not isinstance(compressor, SpectralAtomo),
        **options,
    )
    for step in range(4):
        stacked, separate = twins.step(step, lambda *which: which in missing)
        twins.assert_equal()
        # There is a control word for each parameter, of the dtype in which they are worked on.
        fewer = len(parameters_of(twins.separate[0])) - len(stacks)
        assert separate - stacked == fewer * (8 if dtype == torch.float64 else 4)


EXPERTS: list[Stack] = [((3,), (12, 10)), ((), (12, 10)), ((2, 2), (9, 8)), ((), (10,))]


@pytest.mark.parametrize("momentum_form", ["paper", "sgd"])
@pytest.mark.parametrize("floats", [1, 37, 250])
def test_also_in_chunks_of_rows(
    momentum_form: str, floats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "FLOATS_AT_ONCE", floats)
    twins = Twins(EXPERTS, PowerSGD(rank=2), momentum=0.9, momentum_form=momentum_form)
    for step in range(3):
        twins.step(step)
    twins.assert_equal()


@pytest.mark.parametrize(
    "compressor", [PowerSGD(2), PowerSGDPlus(2, refresh_every=2, refresh_update="exact")], ids=str
)
def test_also_where_updates_are_clipped(compressor: Compressor) -> None:
    twins = Twins(EXPERTS, compressor, momentum=0.9, max_grad_norm=0.5)
    for step in range(4):
        twins.step(step)
        twins.assert_equal()
    assert twins.stacked[0].communication_stats()["grad_norm"] > 0.5


def test_also_after_a_change_of_rank() -> None:
    twins = Twins(EXPERTS, PowerSGD(rank=3, min_compression_rate=0.0), momentum=0.9)
    for step, ranks in enumerate([(3, 3, 3, 3), (1, 3, 2, 1), (4, 1, 5, 1), (4, 1, 5, 1)]):
        counts = (3, 1, 4, 1)
        each = [rank for rank, count in zip(ranks, counts, strict=True) for _ in range(count)]
        for stacked, separate in zip(twins.stacked, twins.separate, strict=True):
            own = stacked.param_groups[0]["per_parameter"]
            stacked.param_groups[0]["per_parameter"] = {**own, "rank": ranks}
            separate.param_groups[0]["per_parameter"] = {"rank": each}
        twins.step(step)
        twins.assert_equal()


@pytest.mark.parametrize("experts", [4, 8])
def test_experts_compress_as_separate_matrices_do(experts: int) -> None:
    """The figures of one expert: 64 × 128 numbers, of which 4·(64 + 128) are sent."""
    weight = torch.zeros(experts, 64, 128, requires_grad=True)
    optimizer = PowerSGDOptimizer([{"params": [weight], "batch_dims": 1}], lr=0.1, rank=4)
    weight.grad = torch.randn(experts, 64, 128, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    stats = optimizer.communication_stats()
    words = 4 * 2
    assert stats["bytes_sent"] == 4 * experts * 4 * (64 + 128) + words
    assert stats["ratio"] > 10.65
    assert optimizer.state[weight]["q"].shape == (experts, 128, 4)


def test_complex_matrices_may_be_stacked() -> None:
    weights = [
        torch.zeros(3, 8, 6, dtype=torch.complex64),
        torch.zeros(3, 8, dtype=torch.complex64),
    ]
    for weight in weights:
        weight.requires_grad_()
        weight.grad = torch.ones_like(weight)
    optimizer = PowerSGDOptimizer(weights, lr=0.1, rank=1, batch_dims=1)
    optimizer.step()
    assert optimizer.state[weights[0]]["q"].shape == (3, 12, 1)  # 6 columns of two numbers each
    assert "q" not in optimizer.state[weights[1]]  # what is a vector stays one


class Choosy(Fusion):
    """Fuses, without a compiler, every product but those whose first number is negative."""

    def apply_(self, function: Any, P_hat: Any, Q: Any, operands: Any, options: Any) -> bool:
        if P_hat[0, 0] < 0:
            return False
        function([(P_hat @ Q).view(operands[0].shape)], *([each] for each in operands), **options)
        return True


def test_what_is_fused_of_a_stack_is_not_done_again() -> None:
    entries = [Entry(0, (2, 2, 5, 4), 2, batch_dims=2), Entry(1, (5, 4), 2), Entry(2, (5, 4), 2)]
    layout = Layout.plan(entries)
    P, Q = gaussian((6, 5, 2), 1), gaussian((6, 2, 4), 2)
    assert 0 < (P[:4, 0, 0] < 0).sum() < 4  # some of the stack are fused, others not
    out = Blocks(layout, torch.float64, CPU)
    own = {index: out.views[index] for index in (0, 2)}
    scratch = torch.empty(40, dtype=torch.float64)
    LowRank(layout, scratch, Choosy(), [P], [Q]).decompress_with_(_add_, own)
    expected = P @ Q
    expected[4] = 0.0  # not asked for
    assert (out.batches[0] - expected).abs().max() < 1e-14  # products of other shapes round so


def _add_(values: list[torch.Tensor], places: list[torch.Tensor]) -> None:
    for value, place in zip(values, places, strict=True):
        place.add_(value)
