"""Compressors that break their claims, and laws of whole runs."""

import dataclasses
import itertools
import multiprocessing
import random
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from efsgd import (
    LQSGD,
    PowerSGD,
    PowerSGDPlus,
    RandomK,
    SignNorm,
    SpectralAtomo,
    TopK,
    UniformQuantized,
)
from efsgd.algorithms.interfaces import Claims
from efsgd.algorithms.low_rank.products import LowRank
from efsgd.algorithms.operators import Payload, Unit
from efsgd.algorithms.powersgd import PowerIteration
from efsgd.algorithms.powersgd_plus import RefreshedPowerIteration
from efsgd.algorithms.tensorwise import Dense, Sent, Tensorwise
from efsgd.layout import Blocks
from efsgd.randomness import Draws
from efsgd.wire.collectives import AllGather, AllReduceMean, Exchange
from tests.testing.broken_compressors import breaks
from tests.testing.good_compressors import Half, Largest, Rounded, TensorwiseOf

# ---- claims --------------------------------------------------------------------------------------

IS_RANDOM = {"rank": 1, "refresh_every": 2, "svd": "randomized"}
#: The law, a good compressor and its settings, and claims that it does not keep.
OVERCLAIMED: list[tuple[str, Any, dict[str, Any], Claims]] = [
    ("contracts_as_claimed", Largest, {}, Claims(False, contraction=lambda shape: 0.4)),
    ("contracts_as_claimed", Half, {}, Claims(True, is_random=True, contraction=lambda shape: 0.7)),
    ("travels_as_claimed", SignNorm, {}, Claims(averages=True)),
    ("travels_as_claimed", PowerSGD, {"rank": 1}, Claims(averages=False)),
    ("is_linear_as_claimed", TopK, {"density": 0.2}, Claims(averages=False, linear=True)),
    ("is_linear_as_claimed", SignNorm, {}, Claims(averages=False, linear=True)),
    ("is_linear_as_claimed", UniformQuantized, {"bits": 8}, Claims(averages=False, linear=True)),
    ("is_linear_as_claimed", LQSGD, {"rank": 1, "bits": 12}, Claims(averages=False, linear=True)),
    ("is_linear_as_claimed", SpectralAtomo, {"rank": 1}, Claims(False, True, linear=True)),
    ("draws_as_claimed", RandomK, {"density": 0.1}, Claims(averages=True, is_random=False)),
    ("draws_as_claimed", PowerSGDPlus, IS_RANDOM, Claims(averages=True, is_random=False)),
    ("draws_as_claimed", SignNorm, {}, Claims(averages=False, is_random=True)),
]
for law, good, settings, claims in OVERCLAIMED:
    made = {"claims": lambda self, own=claims: own}
    breaks(law, **settings)(type(f"{good.__name__}Overclaimed", (good,), made))

#: The law, and noise that breaks it, from that of `Rounded` and a tensor.
NOISES: list[tuple[str, Callable[[Tensor, Tensor], Tensor]]] = [
    ("is_unbiased_as_claimed", lambda own, delta: 0.4 + 0.2 * own),  # almost: it keeps to zero
    ("is_unbiased_as_claimed", lambda own, delta: 0.9 * own),
    ("repeats_to_the_bit", lambda own, delta: torch.rand(delta.shape, dtype=delta.dtype)),
    ("repeats_to_the_bit", lambda own, delta: torch.full_like(delta, random.random())),
]


def noisy(change: Callable[[Tensor, Tensor], Tensor]) -> type[Rounded]:
    class Noisy(Rounded):
        def noise(self, delta: Tensor, draws: Draws) -> Tensor:
            return change(super().noise(delta, draws), delta)

    return Noisy


for law, change in NOISES:
    breaks(law)(noisy(change))


@breaks("contracts_as_claimed")
class Expands(Largest):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return super().decompress((payload[0] * 2.5, payload[1]), shape, draws)

    def claims(self) -> Claims:
        return Claims(False, contraction=lambda shape: 0.0)


@breaks("is_unbiased_as_claimed")
class Shrinks(Rounded):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return 0.96 * super().decompress(payload, shape, draws)


@breaks("contracts_as_claimed")
class GrowsAtRandom(Half):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return 2.5 * super().decompress(payload, shape, draws)

    def claims(self) -> Claims:
        return Claims(True, is_random=True, contraction=lambda shape: 0.0)


# ---- runs ----------------------------------------------------------------------------------------


@breaks("repeats_to_the_bit")
class Counts(Rounded):
    """Draws from a count of its own, in place of the number of the step."""

    count: ClassVar[Any] = itertools.count()

    def noise(self, delta: Tensor, draws: Draws) -> Tensor:
        own = dataclasses.replace(draws, step=next(self.count))
        return super().noise(delta, own)


@breaks("refuses_without_a_trace", rank=1)
class KeepsTooEarly(PowerIteration):
    def aggregate(self, local: LowRank) -> Exchange[LowRank]:
        found = yield from super().aggregate(local)
        super().commit_()
        return found


@breaks("refuses_without_a_trace", rank=1)
@breaks("refuses_without_a_trace", rank=1, options={"steps": 1})
class KeepsBeforeAll(PowerIteration):
    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[LowRank]:
        found = yield from super().compress(deltas, step)
        for query in self.queries:
            query.mul_(1.5)
        return found


class KeepsAtRefreshes(RefreshedPowerIteration):
    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[Any]:
        found = yield from super().compress(deltas, step)
        if step % self._every == 0:
            for query in self.queries:
                query.mul_(1.5)
        return found


@breaks("refuses_without_a_trace", rank=1, refresh_every=2)
@breaks("refuses_without_a_trace", rank=1, refresh_every=2, options={"steps": 1})
class HastyAtRefreshes(PowerSGDPlus):
    def aggregator(self, layout: Any, settings: Any, placement: Any) -> RefreshedPowerIteration:
        return KeepsAtRefreshes(layout, placement, refresh_every=settings["refresh_every"])


class HidesNonfinite(Tensorwise):
    shows_nonfinite = True


@breaks("refuses_without_a_trace")
class Hiding(TensorwiseOf):
    kind = HidesNonfinite

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        return super().compress(delta.nan_to_num(0, 0, 0), draws)


class CountsCommits(Tensorwise):
    count = 0

    def commit_(self, absent: frozenset[int]) -> None:
        self.count += 1

    def _draws(self, unit: Unit, step: int, *others: Any) -> Draws:
        return super()._draws(unit, self.count, *others)


@breaks("resumes_to_the_bit")
@dataclasses.dataclass(frozen=True)
class Forgetful(Half):
    def aggregator(self, layout: Any, settings: Any, placement: Any) -> Tensorwise:
        return CountsCommits(layout, placement, averages=True)


@breaks("agrees_when_alone")
class CleansUpEarly(Tensorwise):
    def aggregate(self, local: Sent) -> Exchange[Dense]:
        if not self._format.nbytes:
            return (yield from super().aggregate(local))
        yield AllReduceMean(self._buffer, "vectors")
        answer = yield AllGather(self._bytes, "payload")
        self._bytes.zero_()
        flat = self._mean.flat.zero_()
        for own in answer.unbind():
            self.add_(flat, self._format.unpack(own), local.step, 1 / len(answer))
        return Dense(self._mean)


class KnowsTheProcess(Largest):
    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        value, where = super().compress(delta, draws)
        is_child = multiprocessing.parent_process() is not None
        return value * (0.5 if is_child else 1.0), where


class FailsInProcesses(Largest):
    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        if draws.worker == 1 and multiprocessing.parent_process() is not None:
            raise ValueError("only in a process")
        return super().compress(delta, draws)
