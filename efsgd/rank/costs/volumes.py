"""What a layer sends at a value of the setting that is decided on.

Counted are ordinary steps. Where steps take turns, as PowerSGD's with `alternating`, it is the mean
of two of them; refreshes of PowerSGD+ are left out, unless every step is one, or every second one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from efsgd.compressors import Compressor
from efsgd.rank.layers import Layer, Value


def with_value(
    compressor: Compressor, settings: Mapping[str, Any], setting: str, value: Value
) -> Compressor:
    """The compressor, a dataclass, with a layer's settings, and this value for one of them."""
    made: Any = compressor
    is_made = dataclasses.is_dataclass(made) and not isinstance(made, type)
    fields = {field.name for field in dataclasses.fields(made) if field.init} if is_made else set()
    if setting not in fields:
        raise TypeError(
            f"Invalid compressor: {compressor!r} is no dataclass with a field {setting!r}. Decorate"
            f" its class with @dataclasses.dataclass(frozen=True); its fields are the settings."
        )
    names = fields.intersection(compressor.settings(), settings)
    kept = {name: settings[name] for name in names}
    return cast(Compressor, dataclasses.replace(made, **{**kept, setting: value}))


def byte_table(
    compressor: Compressor,
    layers: Sequence[Layer],
    setting: str,
    values: Sequence[Value],
    world_size: int = 1,
    *,
    as_all_reduce: bool = False,
) -> list[list[float]]:
    """What one worker sends of each layer alone, a row, at each value, a column; see `total_bytes`.

    Where several layers share bytes (codes of a few bits) they send no more together than the sum.
    """
    known: dict[Any, list[float]] = {}
    keys = [_key(compressor, layer, setting) for layer in layers]
    for key, layer in zip(keys, layers, strict=True):
        if key not in known:
            known[key] = [
                total_bytes(
                    compressor, [layer], setting, [value], world_size, as_all_reduce=as_all_reduce
                )
                for value in values
            ]
    return [list(known[key]) for key in keys]


def total_bytes(
    compressor: Compressor,
    layers: Sequence[Layer],
    setting: str,
    chosen: Sequence[Value],
    world_size: int = 1,
    *,
    as_all_reduce: bool = False,
) -> float:
    """What one worker sends of all layers together, each at its chosen value.

    Layers with equal settings are counted as one payload. With different values it may be a few
    bytes more than is sent, where codes of several layers share them. LQ-SGD's "scatter" may send
    more: up to two scales of each layer and worker.

    With `as_all_reduce` it is as many bytes as an all-reduce would send in the same time: a payload
    that is gathered comes from all W workers, and each of its bytes counts W / 2 times, the ratio
    of the (W - 1)·S bytes that a worker then receives to 2 (W - 1) / W·S.
    """
    groups: dict[Any, list[Layer]] = {}
    for layer, value in zip(layers, chosen, strict=True):
        key = value, layer.device, *_key(compressor, layer, setting)[1:]
        groups.setdefault(key, []).append(layer)
    total: float = 0
    for (value, *_), together in groups.items():
        own = with_value(compressor, together[0].settings, setting, value)
        shapes, dtype = [layer.shape for layer in together], together[0].dtype
        total += (sent := _bytes(own, shapes, dtype, world_size))
        if as_all_reduce and not own.claims().averages:
            whole = [shape for shape in shapes if own.level(shape, own.settings()) is None]
            total += (sent - _bytes(own, whole, dtype, world_size)) * (world_size / 2 - 1)
    return total


def _key(compressor: Compressor, layer: Layer, setting: str) -> tuple[Any, ...]:
    """All that a layer's bytes depend on, besides the value."""
    others = (layer.settings.get(name) for name in compressor.settings() if name != setting)
    return layer.shape, layer.dtype, *others


def _bytes(
    own: Compressor, shapes: Sequence[Sequence[int]], dtype: torch.dtype, world_size: int
) -> int:
    """Of an ordinary step: see above."""
    settings = own.settings()
    first, second, third = (own.step_kind(step, settings) for step in (1, 2, 3))
    steps = (1, 2) if first == third != second else (1,)
    total = sum(own.payload_bytes(shapes, dtype, step, world_size) for step in steps)
    return -(-total // len(steps))
