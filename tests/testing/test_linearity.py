"""Which compressors are linear, and in which steps; by properties, and by the law."""

import dataclasses
from collections.abc import Hashable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from efsgd import (
    LQSGD,
    ErrorFeedbackSGD,
    Identity,
    PowerSGD,
    PowerSGDPlus,
    RandomBlock,
    RandomK,
    SignNorm,
    SpectralAtomo,
    TopK,
    UniformQuantized,
)
from efsgd.algorithms.interfaces import Claims
from efsgd.algorithms.low_rank.products import LowRank
from efsgd.algorithms.powersgd import PowerIteration
from efsgd.algorithms.tensorwise import Tensorwise
from efsgd.compressors.majority_vote import MajorityVote
from efsgd.testing import CompressorLawError, step_together
from efsgd.testing.laws import is_linear_as_claimed
from efsgd.testing.simulation import largest
from efsgd.testing.strategies import gradients
from efsgd.testing.trial import Trial
from efsgd.wire.collectives import Exchange
from tests.strategies import examples
from tests.testing.good_compressors import Half, LowRankOf

LINEAR: list[Any] = [
    Identity(),
    PowerSGD(rank=2, min_compression_rate=0.0),
    PowerSGD(rank=1, warm_start=False),
    PowerSGD(rank=2, alternating=True),
    RandomK(density=0.3),
    RandomBlock(rank=1),
]
NOT_LINEAR: list[Any] = [
    TopK(density=0.2),
    TopK(density=0.2, scope="model"),
    SignNorm(),
    UniformQuantized(bits=12),
    UniformQuantized(bits=12, stochastic=True),
    LQSGD(rank=1, bits=13),
    SpectralAtomo(rank=1),
]
#: Matrices, among them equal ones that stand apart, and a vector.
FEW: dict[str, Any] = {"world_sizes": (1, 2, 3), "shapes": [(7, 6), (30,), (7, 6), (4, 3, 2)]}


def claiming(compressor: Any, **claims: Any) -> Any:
    """The same compressor, which claims something else."""
    kind = type(compressor)
    own = dataclasses.replace(compressor.claims(), **claims)
    made = type(f"{kind.__name__}Claiming", (kind,), {"claims": lambda self: own})
    fields = [field.name for field in dataclasses.fields(compressor) if field.init]
    return made(**{name: getattr(compressor, name) for name in fields})


# ---- by properties, through whole optimizers -----------------------------------------------------


def updates(compressor: Any, made: list[list[Tensor]]) -> list[Tensor]:
    """What a first step makes of all workers' gradients."""
    optimizers = []
    for own in made:
        parameters = [torch.zeros_like(gradient, requires_grad=True) for gradient in own]
        for parameter, gradient in zip(parameters, own, strict=True):
            parameter.grad = gradient.clone()
        options: dict[str, Any] = {"lr": 1.0, "momentum_form": "sgd"}
        optimizers.append(ErrorFeedbackSGD(parameters, compressor=compressor, **options))
    step_together(optimizers)
    return [-parameter.detach() for parameter in optimizers[0].param_groups[0]["params"]]


@pytest.mark.parametrize("compressor", LINEAR, ids=repr)
@pytest.mark.filterwarnings("ignore:All workers have bitwise equal gradients")
@examples(12)
@given(made=gradients(workers=st.integers(1, 4)), scale=st.sampled_from([-3.0, 1e-30, 1e30]))
def test_only_the_mean_matters_and_all_scales_with_it(
    compressor: Any, made: list[list[Tensor]], scale: float
) -> None:
    mean = [torch.stack(each).mean(0) for each in zip(*made, strict=True)]
    found, of_mean = updates(compressor, made), updates(compressor, [mean])
    of_multiple = updates(compressor, [[scale * gradient for gradient in own] for own in made])
    for index, (update, one, multiple) in enumerate(zip(found, of_mean, of_multiple, strict=True)):
        # Of the largest gradient, whose digits are lost where others cancel it, in float64; as the
        # law has it.
        slack = 1e-10 * max(largest(own[index]) for own in made)
        assert torch.allclose(update, one, rtol=0, atol=slack)
        assert torch.allclose(update, multiple / scale, rtol=0, atol=slack)


# ---- the law -------------------------------------------------------------------------------------


def test_those_claim_it_of_which_it_is_true() -> None:
    assert [each.claims().linear for each in LINEAR] == [True] * len(LINEAR)
    others = [*NOT_LINEAR, MajorityVote()]  # the last is Signum's, whose groups it needs
    assert [each.claims().linear for each in others] == [False] * len(others)


@pytest.mark.parametrize("compressor", NOT_LINEAR, ids=repr)
def test_the_law_fails_for_those_that_are_not_if_they_claim_it(compressor: Any) -> None:
    is_linear_as_claimed(Trial(compressor, **FEW))
    with pytest.raises(CompressorLawError, match="what they get differs by"):
        is_linear_as_claimed(Trial(claiming(compressor, linear=True), **FEW))


def test_power_sgd_plus_is_linear_between_refreshes() -> None:
    claims = PowerSGDPlus(rank=2, refresh_every=3).claims()
    assert claims.is_linear_in("ordinary")
    assert not claims.is_linear_in("refresh")
    assert Claims(averages=True, linear=True).is_linear_in(None)
    assert not Claims(averages=True).is_linear_in(None)


def test_what_differs_is_said() -> None:
    with pytest.raises(CompressorLawError, match="from what one gets of their mean"):
        is_linear_as_claimed(Trial(claiming(TopK(density=0.2), linear=True), **FEW))
    with pytest.raises(CompressorLawError, match="from what they get of -3 times as much"):
        is_linear_as_claimed(Trial(Saturated(), **{**FEW, "world_sizes": (1,)}))


@dataclasses.dataclass(frozen=True)
class Saturated(Half):
    """A product with the same mask, of which no element is above 1."""

    def compress(self, delta: Tensor, draws: Any) -> Any:
        (sent,) = super().compress(delta, draws)
        return (sent.clamp(max=1.0),)

    def claims(self) -> Claims:
        return Claims(averages=True, is_random=True, linear=True)


class SquaresInOddSteps(Tensorwise):
    """Not linear in odd steps."""

    def compress(self, deltas: Any, step: int) -> Any:
        if step % 2:
            deltas.flat.mul_(deltas.flat.abs())
        return (yield from super().compress(deltas, step))


@dataclasses.dataclass(frozen=True)
class OddAndEven(Half):
    claimed: Hashable = "even"

    def step_kind(self, step: int, settings: Any) -> str:
        return "odd" if step % 2 else "even"

    def claims(self) -> Claims:
        return Claims(averages=True, is_random=True, linear=frozenset({self.claimed}))

    def aggregator(self, layout: Any, settings: Any, placement: Any) -> Tensorwise:
        return SquaresInOddSteps(layout, placement, averages=True)


def test_only_steps_of_the_claimed_kinds_are_compared() -> None:
    is_linear_as_claimed(Trial(OddAndEven(), **FEW))
    with pytest.raises(CompressorLawError, match="in step 1 "):
        is_linear_as_claimed(Trial(OddAndEven(claimed="odd"), **FEW))


class KeepsWhatIsNotLinear(PowerIteration):
    """The first step is linear; the next one starts from squares."""

    def compress(self, deltas: Any, step: int = 0) -> Exchange[LowRank]:
        found = yield from super().compress(deltas, step)
        self.own = deltas.flat.abs().max()
        return found

    def commit_(self, absent: frozenset[int] = frozenset()) -> None:
        super().commit_(absent)
        for query in self.queries:
            query[:, :, 0] += self.own * query[:, :, 0].abs().max()


def test_what_is_kept_must_be_linear_too() -> None:
    kind = type("Keeping", (LowRankOf,), {"kind": KeepsWhatIsNotLinear})
    with pytest.raises(CompressorLawError, match="in step 1 "):
        is_linear_as_claimed(Trial(kind(rank=1), **FEW))
