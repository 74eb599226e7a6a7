"""What optimizers around error feedback have in common: groups, state, and the workers."""

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias
from weakref import ref

import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from efsgd.arguments import LOCAL, SHARED, validate_parameter, validate_shared
from efsgd.collectives import Exchange, run
from efsgd.compressors import Compressor
from efsgd.errors import CollectiveError
from efsgd.joining import Joining
from efsgd.loading import exact_copies, fill_missing_settings, refuse_overwritten
from efsgd.refusals import refuse_backward_optimizer, refuse_sharding_optimizer
from efsgd.rules import Rules
from efsgd.state import complete_, members
from efsgd.stepper import Groups, LossScaling, Stepper
from efsgd.transports import Alone, ProcessGroup, current_transport

__all__ = ["ErrorFeedbackOptimizer", "Handling"]

Validation: TypeAlias = Callable[[Mapping[str, Any], Compressor], None]


@dataclass(frozen=True)
class Handling:
    """How an optimizer treats its parameter groups.

    Attributes:
        validate: checks a group that is new or loaded.
        validate_again: checks it before each step, for users and schedulers change it.
        rules: how groups are updated; see `efsgd.rules`.
    """

    validate: Validation
    validate_again: Validation
    rules: Callable[[Groups], Rules]


class ErrorFeedbackOptimizer(Joining, Optimizer):
    """Exchanges gradients with error feedback: Algorithm 2, up to what is done with the result.

    Subclasses say how groups are handled.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        defaults: of the groups' settings.
        compressor: decides what is compressed and how far.
        process_group: the workers; None is the default group, looked up at each step.
    """

    _handling: ClassVar[Handling]

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        compressor: Compressor,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        refuse_sharding_optimizer()
        self._process_group = process_group
        defaults |= {"step": 0, "worker": 0, "world_size": 0, **compressor.settings()}
        self._handling.validate(defaults, compressor)
        self._begin(compressor, defaults)
        super().__init__(params, defaults)

    def _begin(self, compressor: Compressor, defaults: Mapping[str, Any]) -> None:
        self._compressor = compressor
        self._loading: dict[str, Any] | None = None
        self._weight = 1.0
        self._last_group: Callable[[], dist.ProcessGroup | None] = _no_group
        settings = [name for name in defaults if name not in LOCAL]
        handling = self._handling
        again = functools.partial(_validate_groups, handling.validate_again, compressor)
        self._stepper = Stepper(compressor, settings, again, handling.rules)

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
            for member in members(self.param_groups):
                validate_parameter(member.parameter, member.name)
        except Exception:
            self.param_groups.pop()
            raise
        self._complete_state()

    def exchange(self, world_size: int = 1, worker: int = 0) -> Exchange[bool]:
        """The step as an exchange, for any driver: `efsgd.collectives.run`, `testing.lockstep`.

        Args:
            world_size: the number of workers.
            worker: this worker's place among them, from 0.

        Returns:
            Whether the step was applied; if not, all workers skipped it.
        """
        scaling = LossScaling.of(self)
        return self._stepper.exchange(
            self.param_groups, self.state, world_size, worker, scaling, self._weight
        )

    def settle_errors(self, world_size: int, worker: int) -> str | None:
        """Leaves out loaded errors that are another worker's, as the next step would.

        Args:
            world_size: the number of workers.
            worker: this worker's place among them, from 0.

        Returns:
            What to warn of, if it was so.
        """
        return self._stepper.settle_errors(self.param_groups, self.state, world_size, worker)

    def _take_step(self) -> bool:
        """Runs `exchange` with the workers of the process group."""
        transport = self._meet()
        step = self.param_groups[0]["step"]
        try:
            return run(self.exchange(transport.world_size, transport.worker), transport)
        except CollectiveError as error:
            raise CollectiveError(
                f"Step {step} was abandoned: {error} Parameters and optimizer state of this worker "
                f"are as they were before step {step}."
            ) from error

    def _meet(self) -> Alone | ProcessGroup:
        """The workers now; notices that they are others than at the last step."""
        transport = current_transport(self._process_group)
        if transport.world_size > 1:
            refuse_backward_optimizer(self)
        if transport.group is not self._last_group():
            self._stepper.regroup()
            # A weak one: a group that is held here would outlive destroy_process_group.
            self._last_group = _no_group if transport.group is None else ref(transport.group)
        return transport

    def compare_workers(self) -> None:
        """Compares the workers' settings, parameters and replicated state, as they are now.

        Every worker of the group must call it, between the same two steps. See `check_every`.

        Raises:
            WorkerMismatchError: names the first difference.
        """
        transport = self._meet()
        if transport.world_size > 1:
            run(self._stepper.compare_all(), transport)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The workers; None is the default group. May be replaced between steps."""
        return self._process_group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._process_group = group

    @property
    def weight(self) -> float:
        """This worker's gradients are multiplied by it before errors are added; 1.0 at first.

        For the mean over all examples of batches that differ in size between workers, set it
        before each step to the size of this worker's batch, times the number of workers, divided
        by the sum of all batches' sizes. It is not part of a state_dict.
        """
        return self._weight

    @weight.setter
    def weight(self, weight: float) -> None:
        if not 0 <= weight < math.inf:
            raise ValueError(f"Invalid weight: {weight!r}. Must be a finite number of at least 0.")
        self._weight = float(weight)

    def communication_stats(self) -> dict[str, Any]:
        """What was handed to collectives by this worker, counted from the buffers.

        With one worker nothing leaves the process; the figures are then those of the buffers that
        would have been sent.

        Returns:
            Of the last step: `collectives`; `bytes_sent`; `bytes_uncompressed`, the size of all
            gradients; `ratio` of the two. Of all steps since construction: `steps` that were
            applied and `skipped_steps` that were not; `total_bytes_sent`, of which
            `check_bytes_sent` went into comparing workers. Bytes are those of one worker's
            buffers: not times the number of workers, nor times what an all-reduce makes of them
            on the wire. With `max_grad_norm` also `grad_norm`, the norm of the last step's Δ'
            before it was clipped. While `time_phases` is set, also `phase_seconds` of the last
            step, a dict whose names are those of the ranges in torch.profiler.
        """
        phases = self._stepper.phases
        seconds = {"phase_seconds": dict(phases.seconds)} if phases.is_timing else {}
        return self._stepper.ledger.report() | seconds

    @property
    def time_phases(self) -> bool:
        """Whether steps are timed; on an accelerator timing waits for it between phases."""
        return self._stepper.phases.is_timing

    @time_phases.setter
    def time_phases(self, is_timing: bool) -> None:
        self._stepper.phases.is_timing = is_timing
        self._stepper.phases.begin_step()

    def broadcast_parameters(self, source: int = 0) -> None:
        """Gives all workers the parameters of one. Every worker of the group must call it.

        Args:
            source: the worker whose parameters are taken (no buffers), counted within the group.

        Raises:
            WorkerMismatchError: the workers do not have the same parameters.
        """
        run(self._stepper.broadcast(self.param_groups, source), self._meet())

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

        def keep(_: Optimizer, final: dict[str, Any]) -> None:
            refuse_overwritten(final["state"], self._stepper.plan.sections)
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
        fill_missing_settings(groups, present.get("param_groups", []), defaults)
        _validate_groups(self._handling.validate, compressor, groups)
        if (loading := present.get("_loading")) is not None:
            state["state"].update(exact_copies(groups, loading))
        present.setdefault("_process_group", None)
        if "_stepper" not in present:
            self._begin(compressor, defaults)
        super().__setstate__(state)
        self._stepper.reload()
        self._complete_state()

    def _complete_state(self) -> None:
        for member in members(self.param_groups):
            if member.parameter.requires_grad:
                complete_(self.state[member.parameter], member, self._compressor)
        if not self.state:  # all are frozen: torch.distributed.checkpoint steps what has no state
            self.state[self.param_groups[0]["params"][0]] = {}


def _no_group() -> None:
    return None


def _validate_groups(validate: Validation, compressor: Compressor, groups: Groups) -> None:
    for group in groups:
        validate(group, compressor)
    validate_shared(groups, (*SHARED, *compressor.shared_settings()))
