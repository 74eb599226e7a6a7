"""What changing ranks consists of, ready to be measured: changes, observed steps, decisions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Runner
from efsgd import PowerSGDOptimizer
from efsgd.algorithms.interfaces import Compressor
from efsgd.engine.observation import Observation
from efsgd.engine.parameters import list_parameters
from efsgd.rank import Accordion, Layer, RankPolicy, RankScheduler, Value
from efsgd.rank.accumulation import Accumulator
from efsgd.rank.layers import layers_of
from efsgd.wire.collectives import Exchange

LOW, HIGH = 2, 4


def optimizer_of(gradients: Sequence[Tensor]) -> PowerSGDOptimizer:
    """PowerSGD of rank 4 with momentum, for parameters that always have the same gradients.

    Args:
        gradients: by parameter; they are shared, and stay as they are.
    """
    parameters = [torch.zeros_like(gradient, requires_grad=True) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return PowerSGDOptimizer(parameters, lr=1e-4, momentum=0.9, rank=HIGH)


class Prescribed(RankPolicy):
    """Proposes what it is told.

    Attributes:
        wanted: ranks by turns: the first layer has the first one, and after the last one begins the
            first again.
    """

    def __init__(self, wanted: Sequence[int]) -> None:
        self.wanted = tuple(wanted)

    @property
    def values(self) -> Sequence[Value]:
        """Those that occur here."""
        return LOW, HIGH

    def begin(self, layers: Sequence[Layer], compressor: Compressor) -> Mapping[int, Value]:
        """What is wanted."""
        return self._prescribed(layers)

    def observe(self, observation: Observation) -> None:
        """Nothing of it is needed."""

    def propose(
        self, layers: Sequence[Layer], world_size: int, worker: int
    ) -> Exchange[Mapping[int, Value]]:
        """What is wanted."""
        yield from ()
        return self._prescribed(layers)

    def _prescribed(self, layers: Sequence[Layer]) -> dict[int, Value]:
        count = len(self.wanted)
        return {layer.index: self.wanted[n % count] for n, layer in enumerate(layers)}

    def commit(self, layers: Sequence[Layer]) -> None:
        """There is nothing to keep."""

    def state_dict(self) -> dict[str, Any]:
        """There is nothing to keep."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """There is nothing to go on from."""


class Changes:
    """Steps of one optimizer whose ranks a scheduler changes.

    Args:
        optimizer: of `optimizer_of`.
    """

    def __init__(self, optimizer: PowerSGDOptimizer) -> None:
        self._policy = Prescribed((HIGH,))
        self._scheduler = RankScheduler(optimizer, self._policy)
        self._optimizer = optimizer
        optimizer.step()

    def runner(self, before: Sequence[int], after: Sequence[int]) -> Runner:
        """A step; if the ranks differ, with the decision to change them that comes before it.

        Args:
            before: ranks of the step before, by turns; see `Prescribed`.
            after: ranks of the step.
        """
        is_change = tuple(before) != tuple(after)

        def prepare() -> None:
            self._change(before)
            self._optimizer.step()  # what a change leaves to its first step is done

        return Runner((lambda: self._change(after)) if is_change else self._optimizer.step, prepare)

    def _change(self, ranks: Sequence[int]) -> None:
        self._policy.wanted = tuple(ranks)
        self._scheduler.step()
        self._optimizer.step()


class Watched:
    """Steps that are shown to accumulators.

    Args:
        optimizer: of `optimizer_of`, after a step.
    """

    def __init__(self, optimizer: PowerSGDOptimizer) -> None:
        self._optimizer = optimizer
        groups, compressor = optimizer.param_groups, optimizer.compressor
        self._layers = layers_of(
            list_parameters(groups), groups, compressor, "rank", (LOW, HIGH), optimizer
        )

    def runner(self, *, with_errors: bool) -> Runner:
        """A step that one accumulator is shown.

        Args:
            with_errors: whether it adds up errors as well.
        """
        accumulator = self._accumulator(with_errors=with_errors)

        def step() -> None:
            end = self._optimizer.watch(accumulator.add)
            self._optimizer.step()
            end()

        return Runner(step, self._optimizer.step)

    def adding(self, *, with_errors: bool) -> Runner:
        """What the accumulator does in such a step, by itself."""
        accumulator, seen = self._accumulator(with_errors=with_errors), []
        end = self._optimizer.watch(seen.append)
        self._optimizer.step()
        end()
        [observation] = seen
        return Runner(lambda: accumulator.add(observation))

    def _accumulator(self, *, with_errors: bool) -> Accumulator:
        accumulator = Accumulator(with_errors=with_errors)
        accumulator.begin(self._layers)
        return accumulator


class Decisions:
    """Decisions of Accordion between the steps of an optimizer of its own.

    Args:
        optimizer: of `optimizer_of`.
    """

    def __init__(self, optimizer: PowerSGDOptimizer) -> None:
        self._optimizer = optimizer
        self._scheduler = RankScheduler(optimizer, Accordion(LOW, HIGH, interval=1))
        self._count = 0

    def runner(self) -> Runner:
        """A decision: sketches, their mean, and what all workers take from worker 0."""
        return Runner(self._decide, self._optimizer.step)

    def _decide(self) -> None:
        self._scheduler.step()
        self._count += 1

    @property
    def bytes_each(self) -> float:
        """What a worker handed to collectives for one."""
        sent: int = self._optimizer.communication_stats()["decision_bytes_sent"]
        return sent / self._count


def adding_all(tensors: Iterable[Tensor]) -> Runner:
    """One pass over the gradient: adds all of it to as many buffers."""
    given = list(tensors)
    sums = [torch.zeros_like(tensor) for tensor in given]
    return Runner(lambda: torch._foreach_add_(sums, given))
