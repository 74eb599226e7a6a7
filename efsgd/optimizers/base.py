"""What all optimizers of this package have in common: groups, state, workers, and steps."""

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from efsgd.algorithms.interfaces import Compressor
from efsgd.checks import plain, require_integer
from efsgd.engine.consistency import broadcast_parameters, compare_all
from efsgd.engine.observation import Listener, Watcher
from efsgd.engine.parameters import device_of
from efsgd.engine.update import LossScaling
from efsgd.errors import CollectiveError
from efsgd.optimizers import joining, settings
from efsgd.optimizers.differentiable import require_differentiable, step_differentiably_
from efsgd.optimizers.reporting import Reporting
from efsgd.optimizers.stateful import StatefulOptimizer
from efsgd.optimizers.unsupported import refuse_backward_optimizer
from efsgd.wire.collectives import Exchange, Transport, intercept, leave_modes, run
from efsgd.wire.transports import ProcessGroup, Workers, transport_of, validate_workers

T = TypeVar("T")


class ErrorFeedbackOptimizer(Reporting, StatefulOptimizer):
    """Exchanges gradients with error feedback: Algorithm 2, up to what is done with the result.

    Subclasses say how groups are handled: see `StatefulOptimizer`.
    """

    # The workers of the last step; a weak reference, as it would outlive destroy_process_group.
    _last_group: Callable[[], object] = staticmethod(lambda: None)
    _join_config: Any = joining.DISABLED
    _step_name = "step()"
    _scale: float | None = None  # of the loss, where no scaler tells of it

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
        loss = None if closure is None else self._evaluate(closure)
        for group in self.param_groups:
            if self.engine.preparations:
                break  # they are part of the engine's steps
            if group.get("differentiable") and self.transport.world_size == 1:
                require_differentiable(self.param_groups, self._compressor)
                with leave_modes():
                    step_differentiably_(self.param_groups, self.state, self._weight)
                self.engine.notes.count_step(self.param_groups, (1, 0))
                return loss
        self._take_step()
        return loss

    def exchange(self, world_size: int = 1, worker: int = 0) -> Exchange[bool]:
        """The step as an exchange, for any driver, such as `efsgd.wire.collectives.run`.

        Args:
            world_size: the number of workers.
            worker: this worker's place among them, from 0.

        Returns:
            Whether the step was applied; if not, all workers skipped it.
        """
        if not (type(world_size) is type(worker) is int and 0 <= worker < world_size):
            require_integer("world_size", world_size, 1)
            world_size = plain(world_size)
            require_integer("worker", worker, 0, world_size - 1)
            worker = plain(worker)
        context, scaling = (world_size, worker), LossScaling.of(self, self._scale)
        return self.engine.exchange(self.param_groups, self.state, context, scaling, self._weight)

    @staticmethod
    def _evaluate(closure: Callable[[], Any]) -> Any:
        """What a closure returns, which computes gradients."""
        with torch.enable_grad():
            return closure()

    def _take_step(self) -> bool:
        """Runs `exchange` with the workers of the process group."""
        if self._join_config is not joining.DISABLED:
            joining.give_notice(self)
        if torch.compiler.is_compiling():  # nothing else gains by it: see `low_rank.fusion`
            return bool(torch.compiler.disable(self._run_exchange)())
        return self._run_exchange()

    def _run_exchange(self) -> bool:
        transport = self.transport
        step = self.engine.notes.step
        try:
            exchange = self.exchange(transport.world_size, transport.worker)
            return run(exchange, transport, self._step_name)
        except CollectiveError as error:
            raise CollectiveError(
                f"Step {step} was abandoned: {error} Parameters and optimizer state of this worker "
                f"are as they were before step {step}."
            ) from error

    def compare_workers(self) -> None:
        """Compares the workers' settings, parameters and replicated state, as they are now.

        Every worker of the group must call it, between the same two steps. See `check_every`.

        Raises:
            WorkerMismatchError: names the first difference.
        """
        transport = self.transport
        if transport.world_size > 1:
            exchange = compare_all(self.settled_groups, self.state, self.method)
            run(exchange, transport, "compare_workers()")

    def broadcast_parameters(self, source: Any = 0) -> None:
        """Gives all workers the parameters of one. Every worker of the group must call it.

        Args:
            source: the worker whose parameters are taken, counted within the group. Buffers are
                given by `efsgd.broadcast_buffers`.

        Raises:
            WorkerMismatchError: the workers do not have the same parameters.
        """
        transport = self.transport
        require_integer("source", source, 0, transport.world_size - 1, remedy="It is a worker.")
        exchange = broadcast_parameters(self.settled_groups, self.method, plain(source))
        run(exchange, transport, "broadcast_parameters()")

    @property
    def process_group(self) -> Workers:
        """The workers; None is the default group. May be replaced between steps.

        Either a process group of torch.distributed, or an `efsgd.wire.collectives.Transport`.
        """
        return self._process_group

    @process_group.setter
    def process_group(self, group: Workers) -> None:
        validate_workers(group)
        self._process_group = group

    @property
    def transport(self) -> Transport:
        """Who carries collectives now; notices that the workers are others than at the last step.

        Raises:
            RuntimeError: there is a process group, but torch.distributed is not initialised.
        """
        transport = transport_of(self._process_group)
        if transport.world_size > 1:
            refuse_backward_optimizer(self)
        group = transport.group if isinstance(transport, ProcessGroup) else transport
        if group is not self._last_group():
            self.engine.on_new_group()
            self._last_group = ref(group)
        return transport

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
        number = settings.number_of({"weight": weight}, "weight")
        if number < 0:
            raise ValueError(f"Invalid weight: {weight!r}. Must be a finite number of at least 0.")
        self._weight = number

    def join_hook(self, **options: Any) -> joining.JoinHook:
        """What this worker does while others still have batches; see torch's `Joinable`."""
        return joining.StepsWithoutGradients(self)

    @property
    def join_device(self) -> torch.device:
        """Where the buffers of Join's own collectives are."""
        return device_of(self.param_groups)

    @property
    def join_process_group(self) -> Any:
        """The workers that wait for each other."""
        return dist.group.WORLD if self.process_group is None else self.process_group

    @property
    def compressor(self) -> Compressor:
        """Decides what is compressed and how far. Its settings now are those in the groups."""
        return self._compressor

    @property
    def sparse_parameters(self) -> frozenset[Tensor]:
        """Those that are known to have sparse gradients: they are sent uncompressed."""
        return frozenset(self.engine.plan.sparse)

    @property
    def watchers(self) -> tuple[Watcher, ...]:
        """Those that `watch` was given and that have not ended."""
        return tuple(self.engine.watchers)

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Shows each step, before it is applied, to a function that decides on later ones.

        Args:
            watcher: called once for each device and dtype of the parameters. Like all hooks it is
                neither copied nor pickled with the optimizer.

        Returns:
            A function that ends it.
        """
        watchers = self.engine.watchers
        watchers.append(watcher)
        return lambda: watchers.remove(watcher)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Shows what steps send, and what comes back, to a function: see `efsgd.audit.observe`.

        Returns a function that ends it.
        """
        listeners = self.engine.listeners
        listeners.append(listener)
        return lambda: listeners.remove(listener)

    def plan_change(self) -> None:
        """To be called by every worker before the same step, if all change settings for it.

        The change then need not be announced, which would cost the collectives of a step: the next
        step begins with a comparison on all workers. What differs is an error on all of them.
        """
        self.engine.handshake.plan_change()

    def decide(self, decision: Callable[[int, int], Exchange[T]], call: str) -> T:
        """Runs an exchange that belongs to no step, with the workers of the process group.

        Args:
            decision: makes the exchange, from the number of workers and this worker's place.
            call: which call of the program this is, for errors.

        Returns:
            Its result.
        """
        transport = self.transport
        exchange = decision(transport.world_size, transport.worker)
        return run(intercept(exchange, self.engine.traffic.record_decision), transport, call)

    def settle_errors(self, world_size: int, worker: int) -> str | None:
        """Leaves out loaded errors that are another worker's, as the next step would.

        Returns:
            What to warn of, if it was so.
        """
        return self.engine.settle_errors(self.state, (world_size, worker))
