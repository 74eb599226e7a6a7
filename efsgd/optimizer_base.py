"""Error-feedback SGD as a torch.optim.Optimizer, for any compressor."""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import ParamsT

from efsgd.arguments import SGD_SETTINGS, SHARED, validate_group, validate_parameter
from efsgd.collectives import Exchange, run
from efsgd.compressors import Compressor, PowerSGD
from efsgd.errors import CollectiveError
from efsgd.loading import (
    exact_copies,
    fill_missing_settings,
    refuse_overwritten,
    validate_groups,
)
from efsgd.state import complete_, members
from efsgd.stepper import LossScaling, Stepper
from efsgd.transports import current_transport

__all__ = ["ErrorFeedbackSGD"]


class ErrorFeedbackSGD(Optimizer):
    """Distributed error-feedback SGD with momentum: Algorithm 2 of PowerSGD, any compressor.

    `step()` takes each worker's own gradients, adds what was not sent before, compresses, averages
    over the workers, and updates. What the compressor leaves alone is averaged as it is.

    The arguments are those of `PowerSGDOptimizer`, which is the case `compressor=PowerSGD(...)`.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        lr: learning rate γ.
        momentum: λ.
        dampening: as in torch.optim.SGD; needs `momentum_form="sgd"`.
        weight_decay: multiple of the parameters that is added to the averaged update.
        nesterov: as in torch.optim.SGD; needs `momentum_form="sgd"`.
        maximize: ascend instead of descending.
        foreach: whether many tensors share a kernel; None: on accelerators.
        differentiable: only False is supported.
        fused: as in torch.optim.SGD; needs `momentum_form="sgd"`.
        compressor: what is sent; None is `PowerSGD()`.
        momentum_form: "paper", or torch.optim.SGD's "sgd".
        error_feedback: whether what was not sent is kept, and sent later.
        start_compressing_at: the number of steps that are sent uncompressed first.
        nonfinite: what all workers do when any of them has a NaN or infinite gradient: "raise"
            a `NonFiniteGradientError`, or "skip" the step. Under torch.amp.GradScaler steps
            are always skipped.
        process_group: the workers; None is the default group, looked up at each step. It is not
            pickled.

    Raises:
        ValueError: an argument is out of range, or two of them contradict each other.
    """

    # torch.amp.GradScaler then calls `step` on every worker, also on one whose gradients have
    # overflowed, and the workers decide together.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        compressor: Compressor | None = None,
        momentum_form: str = "paper",
        error_feedback: bool = True,
        start_compressing_at: int = 0,
        nonfinite: str = "raise",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._compressor: Compressor = PowerSGD() if compressor is None else compressor
        self._process_group = process_group
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "momentum_form": momentum_form,
            "error_feedback": error_feedback,
            "start_compressing_at": start_compressing_at,
            "nonfinite": nonfinite,
            "step": 0,
            **self._compressor.settings(),
        }
        validate_group(defaults)
        self._stepper = Stepper(self._compressor, defaults)
        self._loading: dict[str, Any] | None = None
        super().__init__(params, defaults)

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
            validate_groups(self.param_groups, self._compressor)
            for member in members(self.param_groups):
                validate_parameter(member.parameter, member.name)
        except Exception:
            self.param_groups.pop()
            raise
        self._complete_state()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compresses, aggregates and applies the gradients of all workers.

        Every worker of the group must call it, the same number of times. `p.grad` is not modified.

        Args:
            closure: computes the loss and its gradients; called once, before anything else.

        Returns:
            What `closure` returns.

        Raises:
            NonFiniteGradientError: some worker's gradient is NaN or infinite; nothing has changed.
            WorkerMismatchError: the workers do not train the same thing; nothing has changed.
            CollectiveError: a collective failed; nothing has changed on this worker.
        """
        loss, step = None, self.param_groups[0]["step"]
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        transport = current_transport(self._process_group)
        try:
            run(self.exchange(transport.world_size, transport.worker), transport)
        except CollectiveError as error:
            raise CollectiveError(
                f"Step {step} was abandoned: {error} Parameters and optimizer state of this worker "
                f"are as they were before step {step}."
            ) from error
        return loss

    def exchange(self, world_size: int = 1, worker: int = 0) -> Exchange[None]:
        """The step as an exchange, for any driver: `efsgd.collectives.run`, `testing.lockstep`.

        `worker` is this worker's place among `world_size`, from 0.
        """
        return self._stepper.exchange(
            self.param_groups, self.state, world_size, worker, LossScaling.of(self)
        )

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The workers; None is the default group. May be replaced between steps."""
        return self._process_group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._process_group = group
        self._stepper.forget()

    def communication_stats(self) -> dict[str, Any]:
        """What was handed to collectives by this worker, counted from the buffers.

        With one worker nothing leaves the process; the figures are then those of the buffers that
        would have been sent.

        Returns:
            Of the last step: `collectives`; `bytes_sent`; `bytes_uncompressed`, the size of all
            gradients; `ratio` of the two. Of all steps since construction: `steps` that were
            applied and `skipped_steps` that were not; `total_bytes_sent`, of which
            `check_bytes_sent` went into comparing workers before the first step. Bytes are those
            of one worker's buffers: not times the number of workers, nor times what an all-reduce
            makes of them on the wire. While `time_phases` is set, also `phase_seconds` of the last
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
        transport = current_transport(self._process_group)
        run(self._stepper.broadcast(self.param_groups, source), transport)

    @classmethod
    def from_sgd(cls, sgd: SGD, **options: Any) -> Self:
        """Takes over from a live torch.optim.SGD: same groups, same momenta, same update rule.

        The momentum buffers are shared, not copied: `sgd` is not to be used any more. Learning
        rate schedulers must be made anew, for the new optimizer.

        Args:
            sgd: the optimizer to replace.
            options: this package's own arguments (`rank=4`, ...); `momentum_form` is "sgd".
        """
        if not isinstance(sgd, SGD):
            raise TypeError(f"Invalid sgd: {type(sgd).__name__}. Must be a torch.optim.SGD.")
        defaults = {name: sgd.defaults[name] for name in SGD_SETTINGS}
        groups = [{**group, "params": list(group["params"])} for group in sgd.param_groups]
        optimizer = cls(groups, **defaults, **{"momentum_form": "sgd", **options})
        for parameter, state in sgd.state.items():
            buffer = state.get("momentum_buffer")
            if buffer is not None:
                own = optimizer.state[parameter]
                own["momentum_buffer"], own["momentum_started"] = buffer, torch.tensor(True)
        return optimizer

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
            refuse_overwritten(final["state"], self._stepper.sections)
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
        twin._process_group = self._process_group
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        present = self.__dict__
        compressor: Compressor = (state if "_compressor" in state else present)["_compressor"]
        defaults = (state if "defaults" in state else present)["defaults"]
        groups = state["param_groups"]
        fill_missing_settings(groups, present.get("param_groups", []), defaults)
        validate_groups(groups, compressor)
        if (loading := present.setdefault("_loading", None)) is not None:
            state["state"].update(exact_copies(groups, loading))
        present.setdefault("_process_group", None)
        present.setdefault("_stepper", Stepper(compressor, defaults))
        super().__setstate__(state)
        self._stepper.forget()
        self._complete_state()

    def _complete_state(self) -> None:
        for member in members(self.param_groups):
            if member.parameter.requires_grad:
                complete_(self.state[member.parameter], member, self._compressor)
