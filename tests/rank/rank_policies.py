"""Policies of the tests' own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from efsgd.algorithms.interfaces import Compressor
from efsgd.engine.observation import Observation
from efsgd.randomness import generator_of
from efsgd.rank import Accordion, Layer, RankPolicy, Value
from efsgd.rank.accumulation import Accumulator
from efsgd.wire.collectives import Exchange


class Still(RankPolicy):
    """Looks at everything and changes nothing."""

    def __init__(self) -> None:
        self._accumulator = Accumulator(with_errors=True)
        self.windows = 0

    @property
    def values(self) -> Sequence[Value]:
        return (2,)

    @property
    def accumulators(self) -> Sequence[Accumulator]:
        return (self._accumulator,)

    def begin(self, layers: Sequence[Layer], compressor: Compressor) -> Mapping[int, Value]:
        return {}

    def observe(self, observation: Observation) -> None:
        self._accumulator.add(observation)

    def propose(
        self, layers: Sequence[Layer], world_size: int, worker: int
    ) -> Exchange[Mapping[int, Value]]:
        yield from self._accumulator.means()
        return {}

    def commit(self, layers: Sequence[Layer]) -> None:
        self.windows += 1
        self._accumulator.begin(layers)

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self.windows}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.windows = state_dict["windows"]


class Drawn(Still):
    """Proposes ranks at random, and others on each worker."""

    @property
    def values(self) -> Sequence[Value]:
        return (1, 2, 3, 4)

    def draw(self, layers: Sequence[Layer], worker: int) -> dict[int, Value]:
        """What this worker would have; not the group's own rank, 4, which shows in no override."""
        drawn = torch.randint(1, 4, (len(layers),), generator=generator_of(worker, self.windows))
        return {layer.index: int(r) for layer, r in zip(layers, drawn, strict=True)}

    def propose(
        self, layers: Sequence[Layer], world_size: int, worker: int
    ) -> Exchange[Mapping[int, Value]]:
        yield from super().propose(layers, world_size, worker)
        return self.draw(layers, worker)


class Odd(Accordion):
    """Proposes what it is told to, on the worker that is told."""

    def __init__(self, worker: int, proposal: Any) -> None:
        super().__init__(1, 4, interval=1)
        self._told, self._proposal = worker, proposal

    def propose(
        self, layers: Sequence[Layer], world_size: int, worker: int
    ) -> Exchange[Mapping[int, Value]]:
        proposed = yield from super().propose(layers, world_size, worker)
        if worker != self._told:
            return proposed
        if isinstance(self._proposal, Exception):
            raise self._proposal
        return {layer.index: self._proposal for layer in layers}
