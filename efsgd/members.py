"""The parameters of an optimizer, one by one."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efsgd.blocks import Entry, real_view
from efsgd.compressors import Compressor
from efsgd.individual import settings_of

__all__ = ["Member", "compute_dtype", "members"]


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of errors and factors: float32, or float64 for a parameter of that precision."""
    is_double = parameter.dtype in (torch.float64, torch.complex128)
    return torch.float64 if is_double else torch.float32


@dataclass(frozen=True)
class Member:
    """One parameter of an optimizer.

    Attributes:
        index: its position over all groups.
        parameter: the tensor.
        group: its parameter group.
        position: its place in the group.
        name: for messages: its name if the optimizer knows names, and its index.
        has_sparse_gradients: its gradients are sent uncompressed, made dense.
    """

    index: int
    parameter: Tensor
    group: dict[str, Any]
    position: int
    name: str
    has_sparse_gradients: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """Those of its group, and what it has of its own in their place."""
        return settings_of(self.group, self.position)

    @property
    def values(self) -> Tensor:
        """What is worked on: the parameter, or the real view of a complex one."""
        return real_view(self.parameter)

    @property
    def shape(self) -> torch.Size:
        """Of `values`."""
        shape = self.parameter.shape
        return torch.Size((*shape, 2)) if self.parameter.is_complex() else shape

    @property
    def compressed_shape(self) -> torch.Size:
        """As which it is compressed: what is no matrix by itself is none as a real view either."""
        return self.shape if self.parameter.dim() >= 2 else torch.Size((self.shape.numel(),))

    def entry(self, compressor: Compressor, *, is_compressing: bool = True) -> Entry:
        """Its place in a plan.

        Args:
            compressor: decides how far it is compressed.
            is_compressing: False sends it uncompressed.
        """
        level = None
        if is_compressing and not self.has_sparse_gradients:
            level = compressor.level(self.compressed_shape, self.settings)
        return Entry(self.index, tuple(self.shape), level)


def members(groups: Sequence[dict[str, Any]], sparse: Container[Tensor] = ()) -> Iterator[Member]:
    """All parameters of all groups, in order; one that is listed twice appears once.

    Args:
        groups: parameter groups.
        sparse: the parameters that are known to have sparse gradients.
    """
    index, seen = 0, set()
    for group in groups:
        names = group.get("param_names")
        for position, parameter in enumerate(group["params"]):
            name = f"parameter {index}"
            if names is not None:
                name += f" ({names[position]})"
            if parameter not in seen:
                yield Member(index, parameter, group, position, name, parameter in sparse)
            seen.add(parameter)
            index += 1
