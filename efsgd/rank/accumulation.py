"""Sums of what each worker brought to the steps of a window, and their means over the workers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from efsgd.engine.observation import Observation
from efsgd.wire.collectives import AllReduceMean, Exchange


class Accumulated(Protocol):
    """What is known of a layer here."""

    @property
    def index(self) -> int:
        """Its position in the optimizer."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As which it is compressed."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its sum."""

    @property
    def device(self) -> torch.device:
        """Of its sum."""


class Accumulator:
    """One worker's sum of gradients, or of gradients and errors, over steps.

    It costs as much memory as the layers' gradients in float32, and in each step that is observed
    one pass over them.

    Attributes:
        sums: by index, in the layers' shapes; empty while nothing is accumulated.
        steps: how many steps were added.

    Args:
        with_errors: whether Δ_w = g_w + e_w is summed, in place of g_w.
    """

    def __init__(self, *, with_errors: bool) -> None:
        self.sums: dict[int, Tensor] = {}
        self.steps = 0
        self._with_errors = with_errors
        self._parts: list[tuple[Tensor, list[int]]] = []  # of each device and dtype

    def begin(self, layers: Iterable[Accumulated]) -> None:
        """Starts from zero.

        Args:
            layers: what is summed.
        """
        kinds: dict[tuple[torch.device, torch.dtype], list[Accumulated]] = {}
        for layer in layers:
            kinds.setdefault((layer.device, layer.dtype), []).append(layer)
        self.end()
        for (device, dtype), alike in kinds.items():
            shapes = [torch.Size(layer.shape) for layer in alike]
            sizes = [shape.numel() for shape in shapes]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
            self._parts.append((flat, [layer.index for layer in alike]))
            for layer, shape, part in zip(alike, shapes, flat.split(sizes), strict=True):
                self.sums[layer.index] = part.view(shape)

    def end(self) -> None:
        """Frees the memory."""
        self.sums, self._parts, self.steps = {}, [], 0

    def add(self, observation: Observation) -> None:
        """Adds a step, or the part of it that has one device and dtype."""
        summands: Mapping[int, Tensor] = observation.errors if self._with_errors else {}
        if own := [index for index in summands if index in self.sums]:
            torch._foreach_add_(self._views(own, summands), [summands[i] for i in own])
        summands = observation.gradients
        if own := [index for index in summands if index in self.sums]:
            gradients = [summands[i] for i in own]
            torch._foreach_add_(self._views(own, summands), gradients, alpha=observation.scale)

    def count_step(self) -> None:
        """A step is added, all parts of it."""
        if self.sums:
            self.steps += 1

    def _views(self, indices: Sequence[int], like: Mapping[int, Tensor]) -> list[Tensor]:
        """A vector is compressed as one, whatever shape its parameter has."""
        return [self.sums[index].view(like[index].shape) for index in indices]

    def means(self) -> Exchange[dict[int, Tensor]]:
        """The means of the sums over the workers, by index: new tensors.

        It sends as many numbers as the layers have.
        """
        found = {}
        for flat, indices in self._parts:
            mean = yield AllReduceMean(flat.clone(), "accumulated gradients")
            like = [self.sums[index] for index in indices]
            parts = mean.split([own.numel() for own in like])
            for index, own, part in zip(indices, like, parts, strict=True):
                found[index] = part.view(own.shape)
        return found

    def state_dict(self) -> dict[str, Any]:
        """The sums, which are this worker's own, and the number of steps: live views."""
        return {"steps": self.steps, "sums": dict(self.sums)}

    @staticmethod
    def validate(state_dict: Mapping[str, Any], layers: Sequence[Accumulated]) -> None:
        """Checks what `load_state_dict` is to be given.

        Raises:
            ValueError: a sum has not the shape of its layer.
        """
        sums = state_dict["sums"]
        known = {layer.index: layer for layer in layers}
        for index, value in sums.items():
            shape = known[index].shape if index in known else "no"
            if index not in known or tuple(value.shape) != tuple(known[index].shape):
                raise ValueError(
                    f"Invalid state_dict: the sum of parameter {index} has shape "
                    f"{tuple(value.shape)}, and the layer has {shape}. Load the state_dict of a "
                    f"scheduler of the same model."
                )

    def load_state_dict(self, state_dict: Mapping[str, Any], layers: Sequence[Accumulated]) -> None:
        """Goes on from there.

        Args:
            state_dict: from `state_dict`, or the mean of several; see `validate`.
            layers: what is summed.
        """
        sums = state_dict["sums"]
        self.end()
        if sums:
            self.begin(layer for layer in layers if layer.index in sums)
            for index, value in sums.items():
                self.sums[index].copy_(value)
        self.steps = state_dict["steps"]


def mean_table(
    make: Callable[[], Iterable[Sequence[float]]],
    rows: int,
    columns: int,
    device: torch.device,
    purpose: str,
) -> Exchange[list[list[float]]]:
    """The mean of the workers' tables, the same on all of them.

    Args:
        make: computes this worker's.
        rows: of the table.
        columns: of the table.
        device: where buffers may live.
        purpose: what the table has, for messages.

    Raises:
        Exception: what `make` raises on this worker. The others, who are waiting for its table,
            have NaN in place of numbers.
    """
    table, obstacle = [[math.nan] * columns] * rows, None
    try:
        table = [list(row) for row in make()]
    except Exception as error:  # the other workers are waiting, so it is raised afterwards
        obstacle = error
    own = torch.tensor(table, dtype=torch.float64, device=device)
    mean = yield AllReduceMean(own, purpose)
    if obstacle is not None:
        raise obstacle
    found: list[list[float]] = mean.tolist()
    return found
