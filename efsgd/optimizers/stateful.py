"""Parameter groups and state of an optimizer: how they are made, saved, loaded and copied."""

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from efsgd.algorithms.interfaces import Compressor
from efsgd.engine.parameters import PER_PARAMETER, list_parameters
from efsgd.engine.plan import Groups
from efsgd.engine.state import State, complete_
from efsgd.engine.step import Step
from efsgd.engine.update import Rules
from efsgd.errors import warn_user
from efsgd.optimizers.loading import (
    exact_copies,
    fill_missing_settings,
    keep_other_settings,
    refuse_overwritten,
    validate_structure,
    validate_type,
)
from efsgd.optimizers.settings import (
    LOCAL,
    SHARED,
    kind_of,
    validate_compressor,
    validate_parameter,
    validate_process_group,
    validate_setting_names,
    validate_shared,
)

Validation: TypeAlias = Callable[[Mapping[str, Any], Compressor], None]


@dataclass(frozen=True)
class Handling:
    """How an optimizer treats its parameter groups.

    Attributes:
        validate: checks a group that is new or loaded.
        validate_again: checks it before each step, for users and schedulers change it.
        rules: how groups are updated; see `efsgd.engine.update`.
        telling_settings: a group that has none of them is of another kind of optimizer.
    """

    validate: Validation
    validate_again: Validation
    rules: Callable[[Groups], Rules]
    telling_settings: tuple[str, ...]


class SavableOptimizer(Optimizer):
    """An optimizer with a compressor's settings in its groups, and complete state from the start.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        defaults: of the groups' settings.
        compressor: decides what is compressed and how far.
        process_group: the workers. It is neither saved nor pickled.
    """

    _handling: ClassVar[Handling]

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        compressor: Compressor,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        validate_compressor(compressor)
        validate_process_group(process_group)
        defaults |= {"step": 0, "worker": 0, "world_size": 0, "compressor": kind_of(compressor)}
        defaults[PER_PARAMETER] = None
        validate_setting_names(compressor, defaults)
        defaults |= compressor.settings()
        self._handling.validate(defaults, compressor)
        self._begin(compressor, defaults, process_group)
        super().__init__(params, defaults)

    def _begin(
        self,
        compressor: Compressor,
        defaults: Mapping[str, Any],
        process_group: dist.ProcessGroup | None = None,
        weight: float = 1.0,
    ) -> None:
        """Sets what is neither saved nor pickled."""
        self._compressor, self._process_group, self._weight = compressor, process_group, weight
        self._loading: dict[str, Any] | None = None
        settings = [name for name in defaults if name not in LOCAL]
        handling = self._handling
        again = functools.partial(_validate_groups, handling.validate_again, compressor)
        self._engine = Step(compressor, settings, again, handling.rules)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; on every worker the same, and between the same two steps.

        Raises:
            ValueError: a setting is out of range, or differs from the other groups' though it
                belongs to the optimizer as a whole.
        """
        if self.param_groups and isinstance(param_group, dict):
            for name in (*SHARED, *self._compressor.shared_settings()):
                param_group.setdefault(name, self.param_groups[0][name])
        super().add_param_group(param_group)
        try:
            _validate_groups(self._handling.validate, self._compressor, self.param_groups)
            for info in list_parameters(self.param_groups):
                validate_parameter(info.parameter, info.name)
        except Exception:
            self.param_groups.pop()
            raise
        complete_states_(self.param_groups, self.state, self._compressor)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class, of `efsgd.checkpoint`, or of torch.optim.SGD.

        Tensors are copied in this package's own dtypes: errors of bfloat16 parameters stay
        float32. What the dict lacks (all of ours, in an SGD's) keeps its present setting, or
        starts from nothing. Works without and before torch.distributed's initialisation.

        Args:
            state_dict: from `state_dict()`, possibly saved and loaded by torch.

        Raises:
            ValueError: groups do not match, settings contradict each other, or the dict's errors
                have been overwritten by later steps. Nothing has changed then.
        """
        validate_type(state_dict)

        def keep(_: Optimizer, final: dict[str, Any]) -> None:
            validate_structure(final, self._handling.telling_settings)
            refuse_overwritten(final["state"], self._engine.plan.buckets)
            self._loading = final

        handle = self.register_load_state_dict_pre_hook(keep)  # the last, so it sees what is loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def __getstate__(self) -> dict[str, Any]:
        # A process group cannot be pickled: what is unpickled uses the default group.
        return {**super().__getstate__(), "_compressor": self._compressor}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._process_group, twin._weight = self._process_group, self._weight
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        present = self.__dict__
        compressor: Compressor = (state if "_compressor" in state else present)["_compressor"]
        defaults = (state if "defaults" in state else present)["defaults"]
        groups = state["param_groups"]
        note = keep_other_settings(groups, compressor)
        fill_missing_settings(groups, present.get("param_groups", []), defaults)
        _validate_groups(self._handling.validate, compressor, groups)
        if (loading := present.get("_loading")) is not None:
            state["state"].update(exact_copies(groups, loading))
        if "_engine" not in present:
            self._begin(compressor, defaults)
        complete_states_(groups, state["state"], compressor)  # it raises before anything changes
        super().__setstate__(state)
        self._engine.reload()
        if note is not None:
            warn_user(note)


def complete_states_(
    groups: Groups, states: defaultdict[Tensor, State], compressor: Compressor
) -> None:
    """Adds to all parameters' states what is missing in them, and fits the rest.

    Args:
        groups: parameter groups.
        states: of the parameters (modified in place).
        compressor: decides what is compressed and how far.

    Raises:
        TypeError: an entry is no tensor.
        ValueError: a tensor has not the shape that its parameter asks for.
    """
    for info in list_parameters(groups):
        if info.parameter.requires_grad:
            complete_(states[info.parameter], info, compressor)
    if not states:  # all are frozen: torch.distributed.checkpoint steps what has no state
        states[groups[0]["params"][0]] = {}


def _validate_groups(validate: Validation, compressor: Compressor, groups: Groups) -> None:
    for group in groups:
        validate(group, compressor)
    validate_shared(groups, (*SHARED, *compressor.shared_settings()))
