"""What a layer sends at a value of the setting that is decided on.

Counted are ordinary steps. Where steps take turns, as PowerSGD's with `alternating`, it is the mean
of two of them; refreshes of PowerSGD+ are left out, unless every step is one, or every second one.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from efsgd.compressors import Compressor
from efsgd.rank.base import Layer, Value

__all__ = [
    "all_reduce_bytes",
    "byte_table",
    "bytes_of",
    "total_bytes",
    "with_value",
]


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
        >>> from efsgd.rank.costs import with_value
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
        >>> from efsgd.rank.costs import bytes_of
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
) -> list[list[float]]:
    """`bytes_of`, a row for each layer and a column for each value.

    Where several layers share bytes (codes of a few bits) they send no more together than the sum.
    """
    known: dict[Any, int] = {}
    table: list[list[float]] = []
    for layer in layers:
        row: list[float] = []
        for value in values:
            own = with_value(compressor, layer.settings, setting, value)
            key = layer.shape, layer.dtype, tuple(own.settings().items())
            if key not in known:
                known[key] = _bytes(own, [layer.shape], layer.dtype, world_size)
            row.append(known[key])
        table.append(row)
    return table


def total_bytes(
    compressor: Compressor,
    layers: Sequence[Layer],
    setting: str,
    chosen: Sequence[Value],
    world_size: int = 1,
) -> int:
    """What one worker sends of all layers together.

    Layers with equal settings are counted as one payload.

    Args:
        compressor: of the optimizer.
        layers: which.
        setting: whose values they are.
        chosen: the value of each layer.
        world_size: the number of workers.
    """
    groups = _alike(compressor, layers, setting, chosen)
    return sum(_bytes(own, shapes, dtype, world_size) for own, shapes, dtype in groups)


def all_reduce_bytes(
    compressor: Compressor,
    layers: Sequence[Layer],
    setting: str,
    chosen: Sequence[Value],
    world_size: int = 1,
) -> float:
    """`total_bytes`, but as many as an all-reduce would send in the same time.

    A payload that is gathered comes from all W workers: each of its bytes counts W / 2 times, the
    ratio of (W - 1)·S to 2 (W - 1) / W·S bytes that a worker receives.
    """
    total = 0.0
    for own, shapes, dtype in _alike(compressor, layers, setting, chosen):
        whole = [shape for shape in shapes if own.level(shape, own.settings()) is None]
        uncompressed = _bytes(own, whole, dtype, world_size)
        payload = _bytes(own, shapes, dtype, world_size) - uncompressed
        total += uncompressed + payload * (1 if own.claims().averages else world_size / 2)
    return total


def _bytes(
    own: Compressor, shapes: Sequence[Sequence[int]], dtype: torch.dtype, world_size: int
) -> int:
    """Of an ordinary step: see above."""
    settings = own.settings()
    first, second, third = (own.beat(step, settings) for step in (1, 2, 3))
    steps = (1, 2) if first == third != second else (1,)
    total = sum(own.payload_bytes(shapes, dtype, step, world_size) for step in steps)
    return -(-total // len(steps))


def _alike(
    compressor: Compressor, layers: Sequence[Layer], setting: str, chosen: Sequence[Value]
) -> Iterator[tuple[Compressor, list[tuple[int, ...]], torch.dtype]]:
    """Shapes of layers that are sent together with equal settings."""
    groups: dict[Any, tuple[Compressor, list[tuple[int, ...]], torch.dtype]] = {}
    for layer, value in zip(layers, chosen, strict=True):
        own = with_value(compressor, layer.settings, setting, value)
        key = layer.device, layer.dtype, tuple(own.settings().items())
        groups.setdefault(key, (own, [], layer.dtype))[1].append(layer.shape)
    yield from groups.values()
