"""What optimizers around error feedback have in common: workers, and steps with them."""

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from efsgd.algorithms.interfaces import Compressor
from efsgd.engine.observation import Watcher
from efsgd.engine.step import LossScaling
from efsgd.errors import CollectiveError
from efsgd.optimizers.joining import Joining
from efsgd.optimizers.settings import number_of, validate_process_group
from efsgd.optimizers.stateful import SavableOptimizer
from efsgd.optimizers.unsupported import refuse_backward_optimizer, refuse_sharding_optimizer
from efsgd.wire.collectives import Exchange, intercept, run
from efsgd.wire.transports import Alone, ProcessGroup, current_transport

T = TypeVar("T")


def _no_group() -> None:
    return None


class ErrorFeedbackOptimizer(Joining, SavableOptimizer):
    """Exchanges gradients with error feedback: Algorithm 2, up to what is done with the result.

    Subclasses say how groups are handled.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups.
        defaults: of the groups' settings.
        compressor: decides what is compressed and how far.
        process_group: the workers; None is the default group, looked up at each step.
    """

    # The group of the last step; a weak reference, as it would outlive destroy_process_group.
    _last_group: Callable[[], dist.ProcessGroup | None] = staticmethod(_no_group)

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        compressor: Compressor,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        refuse_sharding_optimizer()
        super().__init__(params, defaults, compressor, process_group)

    def exchange(self, world_size: int = 1, worker: int = 0) -> Exchange[bool]:
        """The step as an exchange, for any driver, such as `efsgd.wire.collectives.run`.

        Args:
            world_size: the number of workers.
            worker: this worker's place among them, from 0.

        Returns:
            Whether the step was applied; if not, all workers skipped it.
        """
        if world_size < 1:
            raise ValueError(f"Invalid world_size: {world_size}. Must be at least 1.")
        if not 0 <= worker < world_size:
            raise ValueError(
                f"Invalid worker: {worker}. Must be a place among {world_size} workers, from 0."
            )
        scaling = LossScaling.of(self)
        return self._engine.exchange(
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
        return self._engine.settle_errors(self.param_groups, self.state, world_size, worker)

    @staticmethod
    def _evaluate(closure: Callable[[], Any] | None) -> Any:
        """What a closure returns, which computes gradients; None where there is none."""
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _take_step(self) -> bool:
        """Runs `exchange` with the workers of the process group."""
        if (
            torch.compiler.is_compiling()
        ):  # there is nothing to gain outside of `efsgd.algorithms.low_rank.fusion`
            return bool(torch.compiler.disable(self._run_exchange)())
        return self._run_exchange()

    def _run_exchange(self) -> bool:
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
            self._engine.on_new_group()
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
            run(self._engine.compare_all(self.param_groups, self.state), transport)

    @property
    def compressor(self) -> Compressor:
        """Decides what is compressed and how far. Its settings now are those in the groups."""
        return self._compressor

    @property
    def sparse_parameters(self) -> frozenset[Tensor]:
        """Those that are known to have sparse gradients: they are sent uncompressed."""
        return frozenset(self._engine.plan.sparse)

    @property
    def watchers(self) -> tuple[Watcher, ...]:
        """Those that `watch` was given and that have not ended."""
        return tuple(self._engine.watchers)

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Shows each step, before it is applied, to a function that decides on later ones.

        Args:
            watcher: called once for each device and dtype of the parameters. Like all hooks it is
                neither copied nor pickled with the optimizer.

        Returns:
            A function that ends it.
        """
        watchers = self._engine.watchers
        watchers.append(watcher)
        return lambda: watchers.remove(watcher)

    def plan_change(self) -> None:
        """To be called by every worker before the same step, if all change settings for it alike.

        The change then need not be announced, which would cost the collectives of a step: the next
        step begins with a comparison on all workers. What differs is an error on all of them.
        """
        self._engine.plan_change()

    def decide(self, decision: Callable[[int, int], Exchange[T]]) -> T:
        """Runs an exchange that belongs to no step, with the workers of the process group.

        Args:
            decision: makes the exchange, from the number of workers and this worker's place.

        Returns:
            Its result.
        """
        transport = self._meet()
        exchange = decision(transport.world_size, transport.worker)
        return run(intercept(exchange, self._engine.traffic.record_decision), transport)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The workers; None is the default group. May be replaced between steps."""
        return self._process_group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        validate_process_group(group)
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
        number = number_of({"weight": weight}, "weight")
        if number < 0:
            raise ValueError(f"Invalid weight: {weight!r}. Must be a finite number of at least 0.")
        self._weight = number

    def communication_stats(self) -> dict[str, Any]:
        """What was handed to collectives by this worker, counted from the buffers.

        With one worker nothing leaves the process; the figures are then those of the buffers that
        would have been sent.

        Returns:
            Of the last step: `collectives`; `bytes_sent`; `bytes_uncompressed`, the size of all
            gradients; `ratio` of the two. Of all steps since construction: `steps` that were
            applied and `skipped_steps` that were not; `total_bytes_sent`, of which
            `check_bytes_sent` went into comparing workers and `decision_bytes_sent` into decisions
            of rank schedulers. Bytes are those of one worker's buffers: not times the number of
            workers, nor times what an all-reduce makes of them on the wire. With `max_grad_norm`
            also `grad_norm`, the norm of the last step's Δ' before it was clipped. While
            `time_phases` is set, also `phase_seconds` of the last step, a dict whose names are
            those of the ranges in torch.profiler.
        """
        phases = self._engine.phases
        seconds = {"phase_seconds": dict(phases.seconds)} if phases.is_timing else {}
        return self._engine.traffic.report() | seconds

    @property
    def time_phases(self) -> bool:
        """Whether steps are timed; on an accelerator timing waits for it between phases."""
        return self._engine.phases.is_timing

    @time_phases.setter
    def time_phases(self, is_timing: bool) -> None:
        self._engine.phases.is_timing = is_timing
        self._engine.phases.begin_step()

    def broadcast_parameters(self, source: Any = 0) -> None:
        """Gives all workers the parameters of one. Every worker of the group must call it.

        Args:
            source: the worker whose parameters are taken (no buffers), counted within the group.

        Raises:
            WorkerMismatchError: the workers do not have the same parameters.
        """
        transport = self._meet()
        if not (isinstance(source, int) and 0 <= source < transport.world_size):
            raise ValueError(
                f"Invalid source: {source!r}. Must be a worker's number, from 0 to "
                f"{transport.world_size - 1}."
            )
        run(self._engine.broadcast(self.param_groups, source), transport)
