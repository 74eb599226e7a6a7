"""Parameter groups and state of an optimizer: how they are made, saved, loaded and copied."""

import copy
import functools
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from efsgd.algorithms.interfaces import Compressor
from efsgd.engine.parameters import PER_PARAMETER, Groups, list_parameters, require_writable
from efsgd.engine.step import Step
from efsgd.engine.update import Method, Rules
from efsgd.errors import warn_user
from efsgd.optimizers import loading, settings
from efsgd.wire.collectives import leave_modes
from efsgd.wire.transports import Workers, validate_workers


class StatefulOptimizer(Optimizer):
    """An optimizer with a compressor's settings in its groups, and complete state from the start.

    Attributes:
        engine: takes the steps, and keeps what is derived from the groups between them.
        method: how the groups are treated.
    """

    _keeps_momentum: ClassVar[bool] = False
    _takes_sparse: ClassVar[bool] = True
    #: A group that has none of these is of another kind of optimizer.
    _telling_settings: ClassVar[tuple[str, ...]] = ("error_feedback",)

    @staticmethod
    def _validate(group: Mapping[str, Any], compressor: Compressor) -> None:
        """Checks a group that is new or loaded."""
        settings.validate_exchange(group, compressor)

    @staticmethod
    def _validate_again(group: Mapping[str, Any], compressor: Compressor) -> None:
        """Checks a group before each step, for users and schedulers change it."""
        settings.validate_exchange(group, compressor)

    @staticmethod
    def _rules(groups: Groups) -> Rules:
        """How groups are updated; see `Method`."""
        raise NotImplementedError

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        compressor: Compressor,
        process_group: Workers,
    ) -> None:
        settings.validate_compressor(compressor)
        validate_workers(process_group)
        kind = settings.kind_of(compressor)
        defaults |= {"step": 0, "worker": 0, "world_size": 0, "compressor": kind}
        defaults[PER_PARAMETER] = None
        settings.validate_setting_names(compressor, defaults)
        defaults |= compressor.settings()
        settings.validate_groups(self._validate, compressor, [defaults])
        self._begin(compressor, defaults, process_group)
        super().__init__(params, defaults)

    def _begin(
        self,
        compressor: Compressor,
        defaults: Mapping[str, Any],
        process_group: Workers = None,
        weight: float = 1.0,
    ) -> None:
        """Sets what is neither saved nor pickled."""
        self._compressor, self._process_group, self._weight = compressor, process_group, weight
        self._loading: dict[str, Any] | None = None
        self.method = Method(
            compressor,
            tuple(name for name in defaults if name not in settings.LOCAL),
            functools.partial(settings.validate_groups, self._validate_again, compressor),
            self._rules,
            self._keeps_momentum,
            self._takes_sparse,
        )
        self.engine = Step(self.method, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; on every worker the same, and between the same two steps.

        Raises:
            ValueError: a setting is out of range, or differs from the other groups' though it
                belongs to the optimizer as a whole.
        """
        if isinstance(param_group, dict):
            for name in (*settings.SHARED, *self._compressor.shared_settings()):
                if self.param_groups:
                    param_group.setdefault(name, self.param_groups[0][name])
            self.engine.notes.write_counters([param_group])
        super().add_param_group(param_group)
        try:
            settings.validate_groups(self._validate, self._compressor, self.settled_groups)
            for info in list_parameters(self.param_groups):
                if info.is_trained:
                    settings.validate_parameter(info.parameter, info.name)
                    require_writable(info)
        except Exception:
            self.param_groups.pop()
            raise
        with leave_modes():
            loading.complete_states_(self.param_groups, self.state, self.method)

    @property
    def settled_groups(self) -> Groups:
        """The parameter groups, in which counters and `per_parameter` are right once more.

        They are after each step and until groups or their parameters change.
        """
        self.engine.notes.settle(self.param_groups)
        return self.param_groups

    def state_dict(self) -> dict[str, Any]:
        """See `torch.optim.Optimizer.state_dict`; errors in it are this worker's own.

        Left out is what is kept for parameters that are in no group any more. Tensors are
        contiguous, but for momentum buffers of parameters that are not: as in torch.optim.SGD these
        are like the parameters.
        """
        groups, whole = self.settled_groups, self.state
        present = {parameter for group in groups for parameter in group["params"]}
        self.state = defaultdict(dict)
        for key, own in whole.items():
            if key in present or not isinstance(key, Tensor):  # others keep things there, too
                self.state[key] = _contiguous(own)
        try:
            return super().state_dict()
        finally:
            self.state = whole

    @leave_modes()
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
        loading.validate_type(state_dict)
        handle = self.register_load_state_dict_pre_hook(_keep_what_is_loaded)  # the last of them
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._loading = None

    def __getstate__(self) -> dict[str, Any]:
        self.engine.notes.settle(self.param_groups)
        # A process group cannot be pickled: what is unpickled uses the default group.
        return {**super().__getstate__(), "_compressor": self._compressor}

    @leave_modes()
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._process_group, twin._weight = self._process_group, self._weight
        return twin

    @leave_modes()
    def __setstate__(self, state: dict[str, Any]) -> None:
        compressor, defaults, note = loading.fit_(state, self.__dict__, self._validate)
        if "engine" not in self.__dict__:
            self._begin(compressor, defaults)
        # It raises before anything changes.
        loading.complete_states_(state["param_groups"], state["state"], self.method)
        super().__setstate__(state)
        self.engine.reload(self.param_groups)
        if note is not None:
            warn_user(note)


@leave_modes()
def _contiguous(own: Any) -> Any:
    """The state of a parameter, with copies of what safetensors would not take."""
    if not isinstance(own, dict):
        return own
    copies = {
        name: value.contiguous()
        for name, value in own.items()
        if isinstance(value, Tensor) and name != "momentum_buffer" and not value.is_contiguous()
    }
    return {**own, **copies} if copies else own


def _keep_what_is_loaded(optimizer: Any, final: dict[str, Any]) -> None:
    """Before torch casts it: see `loading.exact_copies`."""
    loading.validate_structure(final, optimizer._telling_settings)
    loading.refuse_overwritten(final["state"], optimizer.engine.plan.buckets)
    optimizer._loading = final
