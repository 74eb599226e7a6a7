"""Sums of what each worker brought to the steps of a window, and their means over the workers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from efsgd.engine.observation import Observation
from efsgd.rank.layers import Layer
from efsgd.wire.collectives import AllReduceMean, Broadcast, Exchange


class Accumulator:
    """One worker's sum of gradients g_w, or with errors of Δ_w = g_w + e_w, over steps.

    It costs as much memory as the layers' gradients in float32, and in each step that is observed
    one pass over them.
    """

    def __init__(self, *, with_errors: bool) -> None:
        self.sums: dict[int, Tensor] = {}  # by index, in the layers' shapes
        self.steps = 0  # that were added
        self._with_errors = with_errors
        self._parts: list[tuple[Tensor, list[int]]] = []  # of each device and dtype

    def begin(self, layers: Iterable[Layer]) -> None:
        """Starts sums of these layers from zero, and frees those that were before."""
        kinds: dict[tuple[torch.device, torch.dtype], list[Layer]] = {}
        for layer in layers:
            kinds.setdefault((layer.device, layer.dtype), []).append(layer)
        self.sums, self._parts, self.steps = {}, [], 0
        for (device, dtype), own in kinds.items():
            sizes = [math.prod(layer.shape) for layer in own]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
            self._parts.append((flat, [layer.index for layer in own]))
            for layer, part in zip(own, flat.split(sizes), strict=True):
                self.sums[layer.index] = part.view(layer.shape)

    def add(self, observation: Observation) -> None:
        """Adds a step, or the part of it that has one device and dtype."""
        if self._with_errors:
            self._add(observation.errors, 1.0)
        self._add(observation.gradients, observation.scale)

    def _add(self, summands: Mapping[int, Tensor], scale: float) -> None:
        if known := [index for index in summands if index in self.sums]:
            # A vector is compressed as one, whatever shape its parameter has.
            sums = [self.sums[index].view(summands[index].shape) for index in known]
            torch._foreach_add_(sums, [summands[index] for index in known], alpha=scale)

    def count_step(self) -> None:
        """A step is added, all parts of it."""
        if self.sums:
            self.steps += 1

    def means(self) -> Exchange[dict[int, Tensor]]:
        """The means of the sums over the workers, by index: new tensors, sent whole."""
        found = {}
        for flat, indices in self._parts:
            mean = yield AllReduceMean(flat.clone(), "accumulated gradients")
            parts = mean.split([self.sums[index].numel() for index in indices])
            for index, part in zip(indices, parts, strict=True):
                found[index] = part.view(self.sums[index].shape)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The sums, which are this worker's own, and the number of steps: live views."""
        return {"steps": self.steps, "sums": dict(self.sums)}

    @staticmethod
    def validate(state_dict: Mapping[str, Any], layers: Sequence[Layer]) -> None:
        """Raises a ValueError where a sum that is to be loaded has not the shape of its layer."""
        shapes = {layer.index: layer.shape for layer in layers}
        for index, value in state_dict["sums"].items():
            if tuple(value.shape) != shapes.get(index):
                raise ValueError(
                    f"Invalid state_dict: the sum of parameter {index} has shape "
                    f"{tuple(value.shape)}, and the layer has {shapes.get(index, 'no')}. Load the "
                    f"state_dict of a scheduler of the same model."
                )

    def load_state_dict(self, state_dict: Mapping[str, Any], layers: Sequence[Layer]) -> None:
        """Restores what `state_dict` returned, or the mean of several; `validate` comes first."""
        sums = state_dict["sums"]
        self.begin(layer for layer in layers if layer.index in sums)
        for index, value in sums.items():
            self.sums[index].copy_(value)
        self.steps = state_dict["steps"]


def shared_table(
    make: Callable[[], Iterable[Sequence[float]]],
    rows: int,
    columns: int,
    device: torch.device,
    purpose: str,
    collective: type[AllReduceMean | Broadcast] = AllReduceMean,
) -> Exchange[list[list[float]]]:
    """The mean of the tables that all workers make, or that of worker 0; the same on all of them.

    What `make` raises on this worker is raised after the collective; the others then have NaN.
    """
    table, failure = [[math.nan] * columns] * rows, None
    try:
        table = [list(row) for row in make()]
    except Exception as error:  # the other workers are waiting, so it is raised afterwards
        failure = error
    own = torch.tensor(table, dtype=torch.float64, device=device)
    answer = yield collective(own, purpose)
    if failure is not None:
        raise failure
    found: list[list[float]] = answer.tolist()
    return found
