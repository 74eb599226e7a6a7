"""Workers' aggregators in lockstep, without optimizers around them: one exchange at a time."""

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Placement
from efsgd.layout import Blocks, Layout
from efsgd.testing.gradients import made_up
from efsgd.testing.trial import Trial
from efsgd.wire.collectives import Exchange
from efsgd.wire.lockstep import lockstep

#: What is kept from step to step, by parameter and name.
Kept: TypeAlias = Mapping[tuple[int, str], Tensor]


class Outcome(NamedTuple):
    """What came of an exchange on one worker: matrices, flat; and what the next starts from."""

    deltas: Tensor
    sent: Tensor
    received: Tensor
    kept: Kept


class Sender:
    """One worker's aggregator."""

    def __init__(self, trial: Trial, world_size: int, worker: int, dtype: torch.dtype) -> None:
        compressor, settings = copy.deepcopy(trial.compressor), trial.simulate(1).group
        entries = [
            compressor.entry(index, torch.Size(shape), settings)
            for index, shape in enumerate(trial.shapes)
        ]
        self._layout, self._kind = Layout.plan(entries), (dtype, torch.device("cpu"))
        placement = Placement(*self._kind, worker, world_size)
        self.aggregator = compressor.aggregator(self._layout, settings, placement)
        self.aggregator.groups = dict.fromkeys(range(len(entries)), settings)
        for index, views in self.aggregator.state().items():
            initial = compressor.initial_state(entries[index], settings)
            for name, view in views.items():
                view.copy_(initial[name])
        self._deltas = Blocks(self._layout, *self._kind, self.aggregator.vectors)
        self._path = worker, trial.seed, 2

    def made_up(self, kind: str) -> list[Tensor]:
        """A tensor for each parameter, which depends on the worker alone."""
        shapes = (entry.shape for entry in self._layout.entries)
        return [made_up(kind, shape, *self._path, index) for index, shape in enumerate(shapes)]

    def fill(self, tensors: Sequence[Tensor]) -> Blocks:
        """The next exchange's deltas."""
        for index, view in self._deltas.views.items():
            view.copy_(tensors[index])
        return self._deltas

    def exchange(self, step: int, tensors: Sequence[Tensor]) -> Exchange[Outcome]:
        """One exchange after which nothing is kept."""
        deltas = self.fill(tensors)
        left, received = (Blocks(self._layout, *self._kind) for _ in range(2))
        before = deltas.flat.clone()
        local = yield from self.aggregator.compress(deltas, step)
        local.subtract_from_(left)
        mean = yield from self.aggregator.aggregate(local)
        mean.decompress_with_(_copy_, received.views)
        present = self._copies()
        self.aggregator.commit_(frozenset())
        kept = self._copies()
        self.keep_(present)
        return Outcome(before, -left.flat, received.flat, kept)

    def keep_(self, kept: Kept) -> None:
        """Makes the next exchange start from this, so far as it is given."""
        for index, views in self.aggregator.state().items():
            for name, view in views.items():
                view.copy_(kept.get((index, name), view))

    def _copies(self) -> Kept:
        return {
            (index, name): views[name].clone()
            for index, views in self.aggregator.state().items()
            for name in sorted(views)
        }


def senders(trial: Trial, world_size: int, dtype: torch.dtype = torch.float64) -> list[Sender]:
    """Fresh ones, in worker order."""
    return [Sender(trial, world_size, worker, dtype) for worker in range(world_size)]


def exchange(
    workers: Sequence[Sender], step: int, tensors: Sequence[Sequence[Tensor]] | None = None
) -> list[Outcome]:
    """One exchange of all workers with each other, of `tensors` by worker and by parameter.

    Without any, of made-up ones of several scales.
    """
    given = [worker.made_up("scaled") for worker in workers] if tensors is None else tensors
    pairs = zip(workers, given, strict=True)
    return lockstep([worker.exchange(step, own) for worker, own in pairs]).results


def _copy_(values: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for value, target in zip(values, targets, strict=True):
        target.copy_(value)
