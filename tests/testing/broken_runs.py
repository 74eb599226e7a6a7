"""Compressors that break their claims, and laws of whole runs."""

import dataclasses
import itertools
import multiprocessing
import random
from typing import Any, ClassVar

import torch
from torch import Tensor

from efsgd import PowerSGD, PowerSGDPlus, RandomK, SignNorm
from efsgd.algorithms.interfaces import Claims
from efsgd.algorithms.low_rank.products import LowRank
from efsgd.algorithms.operators import Payload, Unit
from efsgd.algorithms.powersgd import PowerIteration
from efsgd.algorithms.powersgd_plus import RefreshedPowerIteration
from efsgd.algorithms.tensorwise import Dense, Sent, Tensorwise
from efsgd.layout import Blocks
from efsgd.randomness import Draws
from efsgd.wire.collectives import AllGather, AllReduceMean, Exchange
from tests.testing.good_compressors import Half, Largest, LowRankOf, Rounded, TensorwiseOf

# ---- claims --------------------------------------------------------------------------------------


class ClaimsTooMuch(Largest):
    def claims(self) -> Claims:
        return Claims(False, contraction=lambda shape: 0.4)


class Expands(Largest):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return super().decompress((payload[0] * 2.5, payload[1]), shape, draws)

    def claims(self) -> Claims:
        return Claims(False, contraction=lambda shape: 0.0)


class ClaimsTooMuchInTheMean(Half):
    def claims(self) -> Claims:
        return Claims(True, is_random=True, contraction=lambda shape: 0.7)


class RoundsToNearest(Rounded):
    """Almost without bias: it keeps to zero."""

    def noise(self, delta: Tensor, draws: Draws) -> Tensor:
        return 0.4 + 0.2 * super().noise(delta, draws)


class RoundsDown(Rounded):
    def noise(self, delta: Tensor, draws: Draws) -> Tensor:
        return 0.9 * super().noise(delta, draws)


class Shrinks(Rounded):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return 0.96 * super().decompress(payload, shape, draws)


class GathersAndAverages(SignNorm):
    def claims(self) -> Claims:
        return Claims(averages=True)


class AveragesAndGathers(PowerSGD):
    def claims(self) -> Claims:
        return Claims(averages=False)


class DrawsInSilence(RandomK):
    def claims(self) -> Claims:
        return Claims(averages=True, is_random=False)


class DrawsWhatItKeeps(PowerSGDPlus):
    def claims(self) -> Claims:
        return Claims(averages=True, is_random=False)


class DrawsNothing(SignNorm):
    def claims(self) -> Claims:
        return Claims(averages=False, is_random=True)


class GrowsAtRandom(Half):
    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        return 2.5 * super().decompress(payload, shape, draws)

    def claims(self) -> Claims:
        return Claims(True, is_random=True, contraction=lambda shape: 0.0)


# ---- runs ----------------------------------------------------------------------------------------


class DrawsGlobally(Rounded):
    def noise(self, delta: Tensor, draws: Draws) -> Tensor:
        return torch.rand(delta.shape, dtype=delta.dtype)


class DrawsFromRandom(Rounded):
    def noise(self, delta: Tensor, draws: Draws) -> Tensor:
        return torch.full_like(delta, random.random())


class Counts(Rounded):
    """Draws from a count of its own, in place of the number of the step."""

    count: ClassVar[Any] = itertools.count()

    def noise(self, delta: Tensor, draws: Draws) -> Tensor:
        own = dataclasses.replace(draws, step=next(self.count))
        return super().noise(delta, own)


class KeepsTooEarly(PowerIteration):
    def aggregate(self, local: LowRank) -> Exchange[LowRank]:
        found = yield from super().aggregate(local)
        super().commit_()
        return found


class Hasty(LowRankOf):
    kind = KeepsTooEarly


class KeepsBeforeAll(PowerIteration):
    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[LowRank]:
        found = yield from super().compress(deltas, step)
        for query in self.queries:
            query.mul_(1.5)
        return found


class HastyFromTheFirst(LowRankOf):
    kind = KeepsBeforeAll


class KeepsAtRefreshes(RefreshedPowerIteration):
    def compress(self, deltas: Blocks, step: int = 0) -> Exchange[Any]:
        found = yield from super().compress(deltas, step)
        if step % self._every == 0:
            for query in self.queries:
                query.mul_(1.5)
        return found


class HastyAtRefreshes(PowerSGDPlus):
    def aggregator(
        self, layout: Any, settings: Any, dtype: Any, device: Any, *_: Any, **__: Any
    ) -> RefreshedPowerIteration:
        every = settings["refresh_every"]
        return KeepsAtRefreshes(layout, dtype, device, refresh_every=every)


class HidesNonfinite(Tensorwise):
    shows_nonfinite = True


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


@dataclasses.dataclass(frozen=True)
class Forgetful(Half):
    def aggregator(
        self,
        layout: Any,
        settings: Any,
        dtype: Any,
        device: Any,
        worker: int = 0,
        *_: Any,
        **__: Any,
    ) -> Tensorwise:
        return CountsCommits(layout, dtype, device, worker, averages=True)


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
        return Dense(self.layout, self._mean)


class Tidy(TensorwiseOf):
    kind = CleansUpEarly


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
