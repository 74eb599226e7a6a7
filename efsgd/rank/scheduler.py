"""Changes what each parameter is compressed to between steps, as a policy proposes."""

import contextlib
import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer

from efsgd.engine.observation import Observation
from efsgd.engine.overrides import set_overrides_
from efsgd.engine.parameters import ParameterInfo, device_of, list_parameters
from efsgd.errors import CollectiveError, WorkerMismatchError
from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.rank.base import RankPolicy
from efsgd.rank.checks import (
    require_exchange,
    require_known,
    require_layers,
    require_mapping,
    validate_arguments,
)
from efsgd.rank.layers import Background, Layer, Value, layers_of
from efsgd.rank.numbers import ParameterNumbers
from efsgd.rank.saving import load_policy, saved, validate_saved
from efsgd.wire.collectives import AllGather, Exchange, leave_modes
from efsgd.wire.compare import compare

#: Those that decide on the settings of some optimizer.
_OPEN: WeakSet["RankScheduler"] = WeakSet()


class RankScheduler:
    """Adapts ranks (or densities, or bits) during training, like a learning rate scheduler.

    `step()` is called at the end of each epoch, or of any other number of steps that is the same on
    every worker, after the learning rate scheduler's::

        scheduler = RankScheduler(optimizer, Accordion(low=1, high=4))
        for epoch in range(epochs):
            for batch in batches:
                ...
                optimizer.step()
            lr_scheduler.step()
            scheduler.step()

    In between it watches the steps of the optimizer. What is decided takes effect with the
    optimizer's next step: errors are kept, factors keep what they learned, and nothing is lost. In
    the parameter groups the values stand as `per_parameter`.

    Args:
        optimizer: whose parameters are compressed: a `PowerSGDOptimizer`, an `ErrorFeedbackSGD` or
            a `GradientAverager`.
        policy: decides. Its values for the first steps are set at once.
        lr_of: the optimizer whose learning rates the policy follows; by default `optimizer`. For a
            `GradientAverager`, which has none, the optimizer that it averages for.

    Raises:
        TypeError: an argument is not of its type.
        ValueError: the policy does not go with the optimizer's compressor, or `lr_of` has none of
            the parameters.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.rank import Accordion, RankScheduler
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1, momentum_form="sgd")
        >>> scheduler = RankScheduler(optimizer, Accordion(low=1, high=4, interval=1))
        >>> for epoch in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 64)).sum().backward()
        ...     optimizer.step()
        ...     scheduler.step()
        ...     print(scheduler.get_last_ranks())
        {'parameter 0': 4}
        {'parameter 0': 1}
        {'parameter 0': 1}
    """

    @leave_modes()
    def __init__(
        self,
        optimizer: ErrorFeedbackOptimizer,
        policy: RankPolicy,
        *,
        lr_of: Optimizer | None = None,
    ) -> None:
        validate_arguments(optimizer, policy, lr_of, _OPEN)
        self.optimizer, self.policy = optimizer, policy
        self._lr_of = optimizer if lr_of is None else lr_of
        self._numbers = ParameterNumbers(list_parameters(optimizer.param_groups))
        self._calls, self._last_step = 0, self._step_number
        self._seen: int | None = None
        self._is_closed = False
        layers = self._layers()
        require_layers(layers, policy, optimizer.compressor, lr_of)
        policy.background = self._background(layers, optimizer.transport.world_size)
        values = policy.begin(layers, optimizer.compressor)
        self._set(require_mapping(values, policy, "begin"))
        policy.commit(self._layers())
        self._stop = optimizer.watch(self._observe)
        _OPEN.add(self)

    @property
    def _step_number(self) -> int:
        """How many steps the optimizer has taken."""
        return self.optimizer.engine.notes.step

    def _infos(self) -> list[ParameterInfo]:
        """All parameters, by their numbers."""
        optimizer = self.optimizer
        listed = list_parameters(optimizer.settled_groups, optimizer.sparse_parameters)
        return self._numbers.apply(listed)

    def _layers(self, more: Iterable[Value] = ()) -> list[Layer]:
        """Those that are compressed at some of the policy's values, or of `more` values."""
        optimizer, policy, infos = self.optimizer, self.policy, self._infos()
        groups, values = optimizer.param_groups, (*policy.values, *more)
        return layers_of(infos, groups, optimizer.compressor, policy.setting, values, self._lr_of)

    def _background(self, layers: Sequence[Layer], world_size: int) -> Background:
        indices, sent = {layer.index for layer in layers}, self.optimizer.communication_stats()
        return Background.of(self._infos(), indices, world_size, sent["collectives"])

    def _observe(self, observation: Observation) -> None:
        if self._step_number != self._seen:  # a step has a part for each device and dtype
            self._seen = self._step_number
            self.policy.count_step()
        self.policy.observe(self._numbers.apply_to(observation, self.optimizer.engine.plan.infos))

    def close(self) -> None:
        """Stops watching the optimizer, and deciding: from then on `step` changes nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._stop()
            _OPEN.discard(self)

    def step(self) -> None:
        """Ends a window: decides what the optimizer's next steps send.

        Every worker must call it, between the same two steps. Where the optimizer has taken no
        step since the last call, nothing is decided.

        Raises:
            CollectiveError: a collective failed, or another worker could not decide. Nothing has
                changed on this worker.
            WorkerMismatchError: the workers do not have the same values before, or are not in the
                same window. Nothing has changed.
            ValueError: the policy proposes what is none of its values. Nothing has changed.
        """
        try:
            self.optimizer.decide(self.exchange, "RankScheduler.step()")
        except CollectiveError as error:
            raise CollectiveError(
                f"RankScheduler.step was abandoned: {error} Every worker must call it, between the "
                f"same two steps of the optimizer. Nothing has changed on this worker."
            ) from error

    def exchange(self, world_size: int = 1, worker: int = 0) -> Exchange[None]:
        """`step` as an exchange, for any driver: `efsgd.wire.collectives.run`, `testing.lockstep`.

        Args:
            world_size: the number of workers.
            worker: this worker's place among them, from 0.
        """
        layers = yield from self._compare()
        if self._is_closed or self._step_number == self._last_step or not layers:
            return
        wanted = [float(layer.value) for layer in layers]
        failure = None
        try:
            self.policy.background = self._background(layers, world_size)
            proposal = self.policy.propose(layers, world_size, worker)
            kind = type(self.policy).__name__
            values = yield from require_exchange(proposal, f"result of {kind}.propose")
            values = require_mapping(values, self.policy, "propose")
            wanted = [float(values.get(layer.index, layer.value)) for layer in layers]
        except CollectiveError:
            raise
        except Exception as error:  # the other workers are waiting, so it is raised afterwards
            failure = error
        words = [failure is not None, *wanted]
        own = torch.tensor(words, dtype=torch.float64, device=layers[0].device)
        try:
            gathered = (yield AllGather(own, "decisions")).cpu()
        except CollectiveError as error:
            raise (error if failure is None else failure) from error
        if failure is not None:
            raise failure
        if unable := gathered[:, 0].nonzero().flatten().tolist():
            numbers = ", ".join(map(str, unable))
            raise CollectiveError(f"worker {numbers} could not decide, and says itself why.")
        decided = require_known(gathered[0, 1:].tolist(), layers, self.policy)
        self.policy.commit([replace(n, value=decided[n.index]) for n in layers])
        self._calls, self._last_step = self._calls + 1, self._step_number
        # What is equal on all workers is new on all of them or on none, however it is written.
        if new := {n.index: decided[n.index] for n in layers if decided[n.index] != n.value}:
            self._set(new)
            self.optimizer.plan_change()

    def _compare(self) -> Exchange[list[Layer]]:
        """The layers, once it is known that all workers have the same, and are in one window."""
        device = device_of(self.optimizer.param_groups)
        try:
            layers = self._layers()
            setting = self.policy.setting
            lines = [f"decisions by {self.policy!r}", f"window {self._calls} of {setting}s"]
            lines += [f"step {self._step_number}, decided on at step {self._last_step}"]
            lines += ["closed" if self._is_closed else "watching"]
            lines += [f"{setting} of {layer.name}: {layer.value}" for layer in layers]
            lines += [f"sums of {list(a.sums)}" for a in self.policy.accumulators]
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            with contextlib.suppress(WorkerMismatchError):
                yield from compare([f"cannot decide: {reason}"], device)
            raise
        yield from compare(lines, device)
        return layers

    def _set(self, values: Mapping[int, Value]) -> None:
        chosen = {i.parameter: values[i.index] for i in self._infos() if i.index in values}
        set_overrides_(self.optimizer.param_groups, self.policy.setting, chosen)
        self.optimizer.engine.notes.settle(self.optimizer.param_groups)

    def get_last_ranks(self) -> dict[str, Value]:
        """What each parameter is compressed to now, by its name; see `RankPolicy.setting`.

        A rank is no larger than the parameter's matrix. Parameters that are never compressed are
        left out.
        """
        found = {}
        for layer in self._layers():
            value = layer.value
            if self.policy.setting == "rank" and isinstance(value, int):
                value = min(value, *layer.matrix)
            found[layer.name] = value
        return found

    def state_dict(self) -> dict[str, Any]:
        """The state of this worker's scheduler, a copy, to be saved beside the optimizer's.

        Sums of gradients in it are this worker's own. With as many workers, each continues from its
        own dict as if never interrupted, to the bit. For another number of workers, see
        `consolidated_state_dict`.
        """
        return copy.deepcopy(self._saved([a.state_dict() for a in self.policy.accumulators]))

    def consolidated_state_dict(self) -> dict[str, Any]:
        """One state_dict for any number of workers, with the mean of the workers' sums.

        Every worker must call it, between the same two steps; all get equal dicts.
        """
        return self.optimizer.decide(self.consolidation, "consolidated_state_dict()")

    def consolidation(self, world_size: int = 1, worker: int = 0) -> Exchange[dict[str, Any]]:
        """`consolidated_state_dict` as an exchange; see `exchange`."""
        yield from self._compare()
        sums = []
        for accumulator in self.policy.accumulators:
            means = yield from accumulator.means()
            sums.append({**accumulator.state_dict(), "sums": means})
        return copy.deepcopy(self._saved(sums))

    def _saved(self, sums: list[dict[str, Any]]) -> dict[str, Any]:
        layers, numbers = self._layers(), [info.index for info in self._infos()]
        known = {layer.index for layer in layers}
        for own in sums:  # not of layers that are in no group any more
            own["sums"] = {n: value for n, value in own["sums"].items() if n in known}
        return saved(self.policy, layers, numbers, self._calls, self._last_step, sums)

    @leave_modes()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` or `consolidated_state_dict` returned.

        It may come before or after the optimizer's `load_state_dict`: both know the values.

        Args:
            state_dict: of a scheduler whose policy is of the same class and decides on the same
                setting, for the same layers. Its other arguments may be others, and count from
                then on.

        Raises:
            ValueError: it is no such dict, another policy's, or of another model. Nothing has
                changed then.
        """
        policy, infos = self.policy, self._infos()
        numbers = [info.index for info in infos]
        layers = validate_saved(state_dict, policy, self._layers(), numbers)
        values = state_dict["values"]
        self._layers(values.values())  # are they in range?
        load_policy(policy, state_dict["policy"])
        for accumulator, sums in zip(policy.accumulators, state_dict["sums"], strict=True):
            accumulator.load_state_dict(sums, layers)
        self._numbers.load(infos, state_dict["numbers"])
        self._set(values)
        self._calls, self._last_step = state_dict["calls"], state_dict["last_step"]
        self._seen = None
