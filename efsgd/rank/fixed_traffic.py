"""What an optimizer's steps send whatever a policy decides."""

from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.engine.parameters import ParameterInfo, compute_dtype
from efsgd.wire.control_words import ControlWords


@dataclass(frozen=True)
class Background:
    """What a step sends besides the layers that are decided on.

    Attributes:
        nbytes: of one worker: parameters that are never compressed, those whose gradients are
            sparse, and control words. Frozen parameters send nothing.
        fixed: indices of layers whose value makes no difference now, since they are frozen or
            their gradients sparse.
        world_size: the number of workers.
        collectives: of a step.
    """

    nbytes: int = 0
    fixed: frozenset[int] = frozenset()
    world_size: int = 1
    collectives: int = 2


def background_of(
    infos: Iterable[ParameterInfo],
    layers: Container[int],
    world_size: int,
    collectives: int,
) -> Background:
    """Counts it.

    Args:
        infos: all parameters of the optimizer.
        layers: indices of those that are decided on.
        world_size: the number of workers.
        collectives: of a step.
    """
    nbytes, fixed = 0, set()
    counts: dict[tuple[torch.device, torch.dtype], int] = {}  # words go with each kind of bucket
    for info in infos:
        parameter: Tensor = info.parameter
        is_fixed = not parameter.requires_grad or info.has_sparse_gradients
        if is_fixed and info.index in layers:
            fixed.add(info.index)
        if not parameter.requires_grad:
            continue
        kind = parameter.device, compute_dtype(parameter)
        counts[kind] = counts.get(kind, 0) + 1
        if is_fixed or info.index not in layers:
            nbytes += info.shape.numel() * kind[1].itemsize
    for (_, dtype), count in counts.items():
        nbytes += ControlWords.count(count, world_size) * dtype.itemsize
    return Background(nbytes, frozenset(fixed), world_size, collectives)
