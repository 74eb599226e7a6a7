"""The same value for every layer, always: what other policies are compared with."""

from collections.abc import Mapping, Sequence
from typing import Any

from efsgd.checks import plain
from efsgd.compressors import Compressor
from efsgd.rank.base import RankPolicy
from efsgd.rank.checks import require_numbers
from efsgd.rank.layers import Layer, Value
from efsgd.wire.collectives import Exchange


class Uniform(RankPolicy):
    """Never changes anything. It communicates nothing beside the decision itself.

    Args:
        value: of every layer.
        setting: of which this is a value.

    Raises:
        ValueError: it is no number, or is out of range.
    """

    def __init__(self, value: Value, setting: str = "rank") -> None:
        require_numbers(value=value)
        self.value, self.setting = plain(value), setting
        self.values = (self.value,)

    def begin(self, layers: Sequence[Layer], compressor: Compressor) -> Mapping[int, Value]:
        """The one."""
        return {layer.index: self.value for layer in layers}

    def propose(
        self, layers: Sequence[Layer], world_size: int, worker: int
    ) -> Exchange[Mapping[int, Value]]:
        """The one, also for layers that are new."""
        yield from ()
        return {layer.index: self.value for layer in layers}

    def commit(self, layers: Sequence[Layer]) -> None:
        """Nothing to keep."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Nothing."""
