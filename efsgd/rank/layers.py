"""The parameters that a policy decides for, and what an optimizer's steps send besides them."""

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from efsgd.compressors import Compressor
from efsgd.engine.parameters import ParameterInfo, compute_dtype
from efsgd.layout import Entry, Matrix, matrix_shape
from efsgd.wire.control_words import ControlWords

#: What is decided on for one parameter: a rank, a density, a number of bits.
Value: TypeAlias = int | float


@dataclass(frozen=True)
class Layer:
    """A parameter for which a policy decides.

    Attributes:
        index: its number, which it keeps; at first its position over all groups of the optimizer.
        name: for messages: its name if the optimizer knows names, and its index.
        shape: as which it is compressed.
        value: of the setting that is decided on, as it is now.
        group: the position of its parameter group.
        lr: the learning rate of its group, now; None where it is not known.
        settings: all that its group and it have, as they are now.
        dtype: of its errors and factors.
        device: the parameter's.
        batch_dims: how many of its first dimensions count matrices; see `efsgd.PowerSGD`.
        first: the number of its first matrix over all parameters; None: its index.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    value: Value
    group: int
    lr: float | None
    settings: Mapping[str, Any]
    dtype: torch.dtype
    device: torch.device
    batch_dims: int = 0
    first: int | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """The matrix [n, m] as which it is seen; of a stack, each of them."""
        return matrix_shape(self.shape, self.batch_dims)

    def matrices(self) -> list[Matrix]:
        """Its matrices, one unless it is a stack of them."""
        return Entry(self.index, self.shape, None, self.batch_dims, self.first).matrices()

    def level(self, compressor: Compressor, setting: str, value: Value) -> Any:
        """How far the compressor compresses it at a value; None: it is sent uncompressed."""
        return compressor.level(self.shape, {**self.settings, setting: value})


def layers_of(
    infos: Iterable[ParameterInfo],
    groups: Sequence[dict[str, Any]],
    compressor: Compressor,
    setting: str,
    values: Iterable[Value],
    lr_of: Optimizer,
) -> list[Layer]:
    """The parameters that are compressed at some of these values.

    The learning rates are those of `lr_of`. A value out of range is a ValueError.
    """
    allowed = sorted(set(compressor.settings()) - set(compressor.shared_settings()))
    kind = type(compressor).__name__
    if setting not in allowed:
        raise ValueError(
            f"Invalid setting: {setting!r}. Must be a setting of {kind} that each parameter may "
            f"have for itself: one of {allowed}."
        )
    choices = list(dict.fromkeys(values))
    lrs = {id(p): group.get("lr") for group in lr_of.param_groups for p in group["params"]}
    positions = {id(group): position for position, group in enumerate(groups)}
    found = []
    for info in infos:
        if is_lazy(info.parameter):
            continue
        lr, settings = lrs.get(id(info.parameter)), info.settings
        layer = Layer(
            index=info.index,
            name=info.name,
            shape=tuple(info.compressed_shape(compressor)),
            value=settings[setting],
            group=positions[id(info.group)],
            lr=None if lr is None else float(lr),
            settings=settings,
            dtype=compute_dtype(info.parameter),
            device=info.parameter.device,
            batch_dims=compressor.batch_dims_of(settings),
            first=info.first,
        )
        for value in choices:
            try:
                compressor.validate({**settings, setting: value})
            except (TypeError, ValueError) as error:
                failure = TypeError if isinstance(error, TypeError) else ValueError
                raise failure(
                    f"{error} That is for {setting}={value!r} of {layer.name}, a value of the "
                    f"policy, which may be made with setting='density', for example."
                ) from error
        if any(layer.level(compressor, setting, value) is not None for value in choices):
            found.append(layer)
    return found


@dataclass(frozen=True)
class Background:
    """What a step of one worker sends besides the layers that are decided on."""

    nbytes: int = 0  # control words, too; frozen parameters send nothing
    fixed: frozenset[int] = frozenset()  # layers that are frozen or have sparse gradients
    world_size: int = 1
    collectives: int = 2

    @classmethod
    def of(
        cls,
        infos: Iterable[ParameterInfo],
        layers: Container[int],
        world_size: int,
        collectives: int,
    ) -> "Background":
        """Counts it, for all parameters of an optimizer and the layers' indices."""
        nbytes, fixed = 0, set()
        counts = Counter[tuple[torch.device, torch.dtype]]()  # control words go with each bucket
        for info in infos:
            is_frozen, is_layer = not info.is_trained, info.index in layers
            if is_layer and (is_frozen or info.has_sparse_gradients):
                fixed.add(info.index)
            if is_frozen:
                continue
            dtype = compute_dtype(info.parameter)
            counts[info.parameter.device, dtype] += 1
            if not is_layer or info.has_sparse_gradients:
                nbytes += info.shape.numel() * dtype.itemsize
        for (_, dtype), count in counts.items():
            nbytes += ControlWords.count(count, world_size) * dtype.itemsize
        return cls(nbytes, frozenset(fixed), world_size, collectives)
