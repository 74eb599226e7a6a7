"""What this package notes in parameter groups, kept right wherever the groups have been.

`param_groups` is a list that anybody may change between steps: parameters and whole groups come,
go, come back and change places. A group that was elsewhere for a while has old counters, and
`per_parameter` is by position. So counters and overrides are kept here, by parameter; what the
groups have is a copy of them, which a state_dict saves.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from efsgd.engine.parameters import PER_PARAMETER, Overrides, frozen, overrides_of

_LISTS = list, tuple


class GroupNotes:
    """Counters of an optimizer, and settings of its single parameters.

    Attributes:
        step: the number of steps that were taken.
        worker: whose errors are in the state.
        world_size: the number of workers at the last step; 0 if the errors are nobody's in
            particular.

    Args:
        defaults: settings of a group that has none of its own.
    """

    def __init__(self, defaults: Mapping[str, Any]) -> None:
        self._defaults = defaults
        self.step, self.worker, self.world_size = 0, 0, 0
        # What each parameter that ever had overrides has, and what the groups were when last seen.
        self._own: dict[Tensor, dict[str, Any]] = {}
        self._seen: dict[int, tuple[dict[str, Any], list[Tensor], Overrides]] = {}

    def shared(self, groups: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """The settings of the optimizer as a whole, which are those of any group."""
        return groups[0] if groups else self._defaults

    def load(self, groups: Sequence[dict[str, Any]]) -> None:
        """Takes over the counters of groups that were loaded; their overrides are theirs."""
        self._own, self._seen = {}, {}
        for group in groups[:1]:
            self.step, self.worker = group["step"], group["worker"]
            self.world_size = group["world_size"]
        self.settle(groups)

    def count_step(self, groups: Sequence[dict[str, Any]], context: tuple[int, int]) -> None:
        """A step was applied, with so many workers of which this one is one."""
        self.step, (self.world_size, self.worker) = self.step + 1, context
        self.write_counters(groups)

    def write_counters(self, groups: Sequence[dict[str, Any]]) -> None:
        """Brings the counters in the groups up to date."""
        for group in groups:
            group["step"], group["worker"] = self.step, self.worker
            group["world_size"] = self.world_size

    def settle(self, groups: Sequence[dict[str, Any]]) -> None:
        """Brings groups up to date that may have been elsewhere, or have other parameters now."""
        self.write_counters(groups)
        if self._own or any([group.get(PER_PARAMETER) for group in groups]):
            for group in groups:
                self._align(group)

    def _align(self, group: dict[str, Any]) -> None:
        """Overrides move with their parameters, unless they were set anew with these."""
        parameters, given = group["params"], group.get(PER_PARAMETER) or {}
        if not isinstance(given, dict) or not all(isinstance(v, _LISTS) for v in given.values()):
            return  # whoever checks it says so
        said = frozen(group)
        _, before, said_before = self._seen.get(id(group), (group, parameters, said))
        has_moved = len(before) != len(parameters) or any(map(operator.is_not, before, parameters))
        if has_moved and said == said_before:
            own = [self._own.get(parameter, {}) for parameter in parameters]
            names = sorted({name for each in own for name in each})
            group[PER_PARAMETER] = {n: tuple(each.get(n) for each in own) for n in names} or None
            said = frozen(group)
        elif any(len(values) != len(parameters) for _, values in said):
            return
        for place, parameter in enumerate(parameters):
            if chosen := overrides_of(group, place):
                self._own[parameter] = chosen
            else:
                self._own.pop(parameter, None)
        self._seen[id(group)] = group, list(parameters), said
