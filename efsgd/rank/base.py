"""What decides how far each parameter is compressed, during training. It names no policy."""

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from efsgd.compressors import Compressor
from efsgd.engine.observation import Observation
from efsgd.rank.accumulation import Accumulator
from efsgd.rank.layers import Background, Layer, Value
from efsgd.wire.collectives import Exchange


class RankPolicy(ABC):
    """Decides on one setting of each layer: the rank of PowerSGD, or what another compressor has.

    `RankScheduler` calls the methods, in the order in which they stand here. Time is cut into
    windows, which end where `RankScheduler.step` is called.

    Attributes:
        setting: the name of the setting: a key of parameter groups.
        values: all values it may ever decide for, in any order.
        accumulators: sums of what was observed: what belongs to one worker alone.
        background: what is sent besides; counted anew before `begin` and before each `propose`.
    """

    setting: str = "rank"
    values: Sequence[Value]
    accumulators: Sequence[Accumulator] = ()
    background: Background = Background()

    def __repr__(self) -> str:
        """Class and arguments: workers whose policies read differently refuse to decide together.

        Arguments are the attributes named like the constructor's; a function is shown by its name,
        without an address. A policy whose attributes differ between workers must override this.
        """
        names = inspect.signature(type(self).__init__).parameters
        found = {name: getattr(self, name) for name in names if hasattr(self, name)}
        shown = (f"{n}={getattr(v, '__qualname__', None) or repr(v)}" for n, v in found.items())
        return re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(self).__name__}({', '.join(shown)})")

    @abstractmethod
    def begin(self, layers: Sequence[Layer], compressor: Compressor) -> Mapping[int, Value]:
        """Makes ready for the first window. Nothing may be communicated.

        Args:
            layers: those that the compressor compresses at some of `values`.
            compressor: of the optimizer.

        Returns:
            What the first window is to have, by the layers' indices.

        Raises:
            ValueError: the policy and the compressor do not go together.
        """

    def count_step(self) -> None:
        """A step is about to be shown, in as many parts as it has devices and dtypes."""
        for accumulator in self.accumulators:
            accumulator.count_step()

    def observe(self, observation: Observation) -> None:
        """Is shown a step that is about to be applied; once for each device and dtype."""
        for accumulator in self.accumulators:
            accumulator.add(observation)

    @abstractmethod
    def propose(
        self, layers: Sequence[Layer], world_size: int, worker: int
    ) -> Exchange[Mapping[int, Value]]:
        """What the next window should have. It may communicate, and must not change anything.

        All workers call it, and all then take what worker 0 proposes: what is decided is the same
        on every worker by construction. What one worker raises after its last collective is raised
        on all; before it the others would wait for a collective until the time-out.

        Args:
            layers: as they are now.
            world_size: the number of workers.
            worker: this worker's place among them, from 0.

        Returns:
            By index, each one of `values`. A layer that is left out keeps its value.
        """

    @abstractmethod
    def commit(self, layers: Sequence[Layer]) -> None:
        """All workers have agreed; a window begins.

        Args:
            layers: with their new values.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What its state consists of, without what the accumulators hold: plain numbers."""

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores the state that `state_dict` returned."""
