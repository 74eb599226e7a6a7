"""What a layer sends at a value of the setting that is decided on.

Counted are ordinary steps. Where steps take turns, as PowerSGD's with `alternating`, it is the mean
of two of them; refreshes of PowerSGD+ are left out, unless every step is one, or every second one.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch

from efsgd.compressors import Compressor
from efsgd.rank.base import Layer, Value


def with_value(
    compressor: Compressor, settings: Mapping[str, Any], setting: str, value: Value
) -> Compressor:
    """The compressor with a layer's settings, and this value in place of one of them.

    Args:
        compressor: a dataclass whose fields are its settings.
        settings: of the layer; others than the compressor's are ignored.
        setting: the name of one.
        value: of it.

    Raises:
        TypeError: the compressor is no dataclass, or the setting none of its fields.
        ValueError: the compressor refuses the value.

    Example:
        >>> from efsgd import PowerSGD
        >>> from efsgd.rank.costs.volumes import with_value
        >>> own = with_value(PowerSGD(rank=4), {"rank": 2, "min_compression_rate": 2.0}, "rank", 8)
        >>> own.rank, own.min_compression_rate
        (8, 2.0)
    """
    made: Any = compressor
    is_made = dataclasses.is_dataclass(made) and not isinstance(made, type)
    fields = {field.name for field in dataclasses.fields(made) if field.init} if is_made else set()
    if setting not in fields:
        raise TypeError(
            f"Invalid compressor: {compressor!r} is no dataclass with a field {setting!r}, so that "
            f"what it would send with another {setting} cannot be told. Decorate its class with "
            f"@dataclasses.dataclass(frozen=True); its fields are the settings."
        )
    chosen = {name: settings[name] for name in compressor.settings() if name in settings}
    kept = {name: own for name, own in chosen.items() if name in fields}
    return cast(Compressor, dataclasses.replace(made, **{**kept, setting: value}))


def bytes_of(
    compressor: Compressor, layer: Layer, setting: str, value: Value, world_size: int = 1
) -> int:
    """What one worker sends of a layer in a step; all of it where it is not compressed.

    Args:
        compressor: of the optimizer.
        layer: which.
        setting: whose value it is.
        value: of the setting.
        world_size: the number of workers.

    Example:
        >>> from efsgd import PowerSGDOptimizer
        >>> from efsgd.rank.base import layers_of
        >>> from efsgd.rank.costs.volumes import bytes_of
        >>> optimizer = PowerSGDOptimizer([torch.zeros(64, 32, requires_grad=True)], lr=0.1)
        >>> compressor, groups = optimizer.compressor, optimizer.param_groups
        >>> (layer,) = layers_of(groups, compressor, "rank", [1, 64], optimizer)
        >>> bytes_of(compressor, layer, "rank", 2), bytes_of(compressor, layer, "rank", 64)
        (768, 8192)
    """
    own = with_value(compressor, layer.settings, setting, value)
    return _bytes(own, [layer.shape], layer.dtype, world_size)


def byte_table(
    compressor: Compressor,
    layers: Iterable[Layer],
    setting: str,
    values: Sequence[Value],
    world_size: int = 1,
    *,
    as_all_reduce: bool = False,
) -> list[list[float]]:
    """`bytes_of`, a row for each layer and a column for each value.

    Where several layers share bytes (codes of a few bits) they send no more together than the sum.

    Args:
        compressor: of the optimizer.
        layers: which.
        setting: whose values they are.
        values: of the setting.
        world_size: the number of workers.
        as_all_reduce: see `total_bytes`.
    """
    names, known = _others(compressor, setting), dict[Any, list[float]]()
    for layer in (listed := list(layers)):
        key = _key(layer, names)
        if key not in known:
            made = [with_value(compressor, layer.settings, setting, value) for value in values]
            known[key] = [
                _cost(own, [layer.shape], layer.dtype, world_size, as_all_reduce) for own in made
            ]
    return [list(known[_key(layer, names)]) for layer in listed]


def total_bytes(
    compressor: Compressor,
    layers: Sequence[Layer],
    setting: str,
    chosen: Sequence[Value],
    world_size: int = 1,
    *,
    as_all_reduce: bool = False,
) -> float:
    """What one worker sends of all layers together.

    Layers with equal settings are counted as one payload, which is exact where all have the same
    value. With different values it is what is sent, or a few bytes more where codes of several
    layers share them. LQ-SGD's "scatter" may send more: up to two scales of each layer and worker.

    Args:
        compressor: of the optimizer.
        layers: which.
        setting: whose values they are.
        chosen: the value of each layer.
        world_size: the number of workers.
        as_all_reduce: counts as many bytes as an all-reduce would send in the same time. A payload
            that is gathered comes from all W workers: each of its bytes counts W / 2 times, the
            ratio of the (W - 1)·S bytes that a worker then receives to 2 (W - 1) / W·S.
    """
    names = _others(compressor, setting)
    groups: dict[Any, list[Layer]] = {}
    for layer, value in zip(layers, chosen, strict=True):
        groups.setdefault((value, layer.device, _key(layer, names)[1:]), []).append(layer)
    total: float = 0
    for (value, *_), alike in groups.items():
        own = with_value(compressor, alike[0].settings, setting, value)
        shapes = [layer.shape for layer in alike]
        total += _cost(own, shapes, alike[0].dtype, world_size, as_all_reduce)
    return total


def _others(compressor: Compressor, setting: str) -> tuple[str, ...]:
    """The settings that are not decided on."""
    return tuple(name for name in compressor.settings() if name != setting)


def _key(layer: Layer, names: Iterable[str]) -> tuple[Any, ...]:
    """All that its bytes depend on, besides the value."""
    return layer.shape, layer.dtype, *(layer.settings.get(name) for name in names)


def _cost(
    own: Compressor,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    world_size: int,
    as_all_reduce: bool,
) -> float:
    sent = _bytes(own, shapes, dtype, world_size)
    if not as_all_reduce or own.claims().averages:
        return sent
    whole = [shape for shape in shapes if own.level(shape, own.settings()) is None]
    uncompressed = _bytes(own, whole, dtype, world_size)
    return uncompressed + (sent - uncompressed) * world_size / 2


def _bytes(
    own: Compressor, shapes: Sequence[Sequence[int]], dtype: torch.dtype, world_size: int
) -> int:
    """Of an ordinary step: see above."""
    settings = own.settings()
    first, second, third = (own.step_kind(step, settings) for step in (1, 2, 3))
    steps = (1, 2) if first == third != second else (1,)
    total = sum(own.payload_bytes(shapes, dtype, step, world_size) for step in steps)
    return -(-total // len(steps))
