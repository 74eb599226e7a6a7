"""Changes what each parameter is compressed to between steps, as a policy proposes."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from efsgd.blocks import matrix_shape
from efsgd.collectives import AllGather, Exchange
from efsgd.errors import CollectiveError, WorkerMismatchError
from efsgd.individual import PER_PARAMETER
from efsgd.members import members
from efsgd.observation import Observation
from efsgd.optimizer_base import ErrorFeedbackOptimizer
from efsgd.rank.background import Background, background_of
from efsgd.rank.base import Layer, RankPolicy, Value, layers_of
from efsgd.transports import current_transport

__all__ = ["RankScheduler"]


class RankScheduler:
    """Adapts ranks (or densities, or bits) as training goes on, like a learning rate scheduler.

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
        ValueError: the policy does not go with the optimizer's compressor.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.rank import Accordion, RankScheduler
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1)
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

    def __init__(
        self,
        optimizer: ErrorFeedbackOptimizer,
        policy: RankPolicy,
        *,
        lr_of: Optimizer | None = None,
    ) -> None:
        if not isinstance(optimizer, ErrorFeedbackOptimizer):
            raise TypeError(
                f"Invalid optimizer: {type(optimizer).__name__}. Must be one of this package, for "
                f"example efsgd.PowerSGDOptimizer."
            )
        if not isinstance(policy, RankPolicy):
            raise TypeError(
                f"Invalid policy: {policy!r}. Must be an efsgd.rank.RankPolicy, for example "
                f"Accordion(low=1, high=4)."
            )
        self.optimizer, self.policy = optimizer, policy
        self._lr_of = optimizer if lr_of is None else lr_of
        self._calls, self._last_step = 0, self._step_number
        self._seen: int | None = None
        layers = self._layers()
        world_size = current_transport(optimizer.process_group).world_size
        policy.background = self._background(layers, world_size)
        self._set(policy.begin(layers, optimizer.compressor))
        policy.commit(self._layers())
        self._stop = optimizer.watch(self._observe)

    @property
    def _step_number(self) -> int:
        """How many steps the optimizer has taken."""
        return int(self.optimizer.param_groups[0]["step"])

    def _layers(self) -> list[Layer]:
        optimizer, policy = self.optimizer, self.policy
        groups, values = optimizer.param_groups, policy.values
        return layers_of(groups, optimizer.compressor, policy.setting, values, self._lr_of)

    def _background(self, layers: Sequence[Layer], world_size: int) -> Background:
        optimizer = self.optimizer
        listed = members(optimizer.param_groups, optimizer._stepper.plan.sparse)
        collectives = optimizer.communication_stats()["collectives"]
        return background_of(listed, {layer.index for layer in layers}, world_size, collectives)

    def _observe(self, observation: Observation) -> None:
        if self._step_number != self._seen:  # a step has a part for each device and dtype
            self._seen = self._step_number
            self.policy.count_step()
        self.policy.observe(observation)

    def close(self) -> None:
        """Stops watching the optimizer. Values stay as they are."""
        self._stop()

    def step(self) -> None:
        """Ends a window: decides what the optimizer's next steps send.

        Every worker must call it, between the same two steps. Where the optimizer has taken no
        step since the last call, nothing is decided.

        Raises:
            CollectiveError: a collective failed, or another worker could not decide. Nothing has
                changed on this worker.
            WorkerMismatchError: the workers do not have the same values before.
        """
        self.optimizer.decide(self.exchange)

    @torch.no_grad()
    def exchange(self, world_size: int = 1, worker: int = 0) -> Exchange[None]:
        """`step` as an exchange, for any driver: `efsgd.collectives.run`, `testing.lockstep`.

        Args:
            world_size: the number of workers.
            worker: this worker's place among them, from 0.
        """
        if self._step_number == self._last_step:
            return
        layers = self._layers()
        present = {layer.index: layer.value for layer in layers}
        values, obstacle = present, None
        try:
            self.policy.background = self._background(layers, world_size)
            values = {**present, **(yield from self.policy.propose(layers, world_size, worker))}
        except CollectiveError:
            raise
        except Exception as error:  # the other workers are waiting, so it is raised afterwards
            obstacle = error
        wanted = [values[index] for index in present]
        words = [obstacle is not None, *present.values(), *wanted]
        own = torch.tensor(words, dtype=torch.float64, device=layers[0].device)
        gathered = (yield AllGather(own, "decisions")).cpu()
        if obstacle is not None:
            raise obstacle
        decided = self._read(gathered, [layer.name for layer in layers])
        kinds = zip(present, wanted, decided, strict=True)
        self._calls, self._last_step = self._calls + 1, self._step_number
        if self._set({i: int(d) if isinstance(own, int) else d for i, own, d in kinds}):
            self.optimizer.plan_change()
        self.policy.commit(self._layers())

    def _read(self, gathered: Tensor, names: Sequence[str]) -> list[float]:
        """What worker 0 proposes, if all workers can follow."""
        if unable := gathered[:, 0].nonzero().flatten().tolist():
            numbers = ", ".join(map(str, unable))
            raise CollectiveError(f"could not decide, and say themselves why: worker {numbers}.")
        present, proposed = gathered[:, 1 : 1 + len(names)], gathered[0, 1 + len(names) :]
        for position, name in enumerate(names):
            if len(found := present[:, position].tolist()) > found.count(found[0]):
                raise WorkerMismatchError(
                    f"The {self.policy.setting} of {name} is {found} on the workers, in their "
                    f"order. Parameter groups and state_dicts must be changed on all of them alike."
                )
        own: list[float] = proposed.tolist()
        return own

    def _set(self, values: Mapping[int, Value]) -> bool:
        """Writes values to the parameter groups. Has any changed?"""
        setting, first, has_changed = self.policy.setting, 0, False
        for group in self.optimizer.param_groups:
            own = group[PER_PARAMETER] or {}
            count = len(group["params"])
            before = tuple(own.get(setting, [None] * count))
            indices = range(first, first + count)
            after = tuple(values.get(i, old) for i, old in zip(indices, before, strict=True))
            if after != before:
                group[PER_PARAMETER], has_changed = {**own, setting: after}, True
            first += count
        return has_changed

    def get_last_ranks(self) -> dict[str, Value]:
        """What each parameter is compressed to now, by its name; see `RankPolicy.setting`.

        A rank is no larger than the parameter's matrix. Parameters that are never compressed are
        left out.
        """
        found = {}
        for layer in self._layers():
            value = layer.value
            if self.policy.setting == "rank" and isinstance(value, int):
                value = min(value, *matrix_shape(layer.shape))
            found[layer.name] = value
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that this worker's scheduler goes on from, to be saved beside the optimizer's.

        Sums of gradients in it are this worker's own. On the same number of workers each goes on to
        the bit from its own dict; for another number, see `consolidated_state_dict`. It is a copy.
        """
        return copy.deepcopy(self._saved([a.state_dict() for a in self.policy.accumulators]))

    def consolidated_state_dict(self) -> dict[str, Any]:
        """One state_dict for any number of workers, with the mean of the workers' sums.

        Every worker must call it, between the same two steps; all get equal dicts.
        """
        return self.optimizer.decide(self.consolidation)

    @torch.no_grad()
    def consolidation(self, world_size: int = 1, worker: int = 0) -> Exchange[dict[str, Any]]:
        """`consolidated_state_dict` as an exchange; see `exchange`."""
        sums = []
        for accumulator in self.policy.accumulators:
            means = yield from accumulator.means()
            sums.append({**accumulator.state_dict(), "sums": means})
        return copy.deepcopy(self._saved(sums))

    def _saved(self, sums: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "setting": self.policy.setting,
            "values": {layer.index: layer.value for layer in self._layers()},
            "calls": self._calls,
            "last_step": self._last_step,
            "policy": self.policy.state_dict(),
            "sums": sums,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` or `consolidated_state_dict` returned.

        It may come before or after the optimizer's `load_state_dict`: both know the values.

        Args:
            state_dict: of a scheduler with a policy that was made with the same arguments.

        Raises:
            ValueError: it is another policy's, or of another model.
        """
        values = state_dict["values"]
        indices = [layer.index for layer in self._layers()]
        if state_dict["setting"] != self.policy.setting or list(values) != indices:
            raise ValueError(
                f"Invalid state_dict: it has the {state_dict['setting']} of parameters "
                f"{list(values)}, and this scheduler decides on the {self.policy.setting} of "
                f"{indices}. Make model and policy as they were when it was saved."
            )
        self.policy.load_state_dict(state_dict["policy"])
        for accumulator, own in zip(self.policy.accumulators, state_dict["sums"], strict=True):
            accumulator.load_state_dict(own, self._layers())
        self._set(values)
        self._calls, self._last_step = state_dict["calls"], state_dict["last_step"]
