"""A comparison of all that workers must have in common, whenever it is asked for."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Compressor
from efsgd.engine.buckets import _entry
from efsgd.engine.parameters import PER_PARAMETER, ParameterInfo, list_parameters, overrides_of
from efsgd.engine.plan import Groups
from efsgd.engine.state import LOCAL_STATE, State
from efsgd.wire.collectives import Exchange
from efsgd.wire.compare import checksums, compare


def replicated(listed: Iterable[ParameterInfo], state: Mapping[Tensor, State]) -> dict[str, Tensor]:
    """What must be equal on all workers, by name: parameters and state, but for what is local.

    Args:
        listed: the parameters.
        state: of the optimizer.
    """
    chosen = list(listed)
    named = {info.name: info.parameter.detach() for info in chosen}
    for info in chosen:
        for key, value in sorted(state.get(info.parameter, {}).items()):
            if key not in LOCAL_STATE and isinstance(value, Tensor):
                named[f"{key} of {info.name}"] = value
    return named


def describe(
    infos: Iterable[ParameterInfo],
    compressor: Compressor,
    settings: Iterable[str],
) -> list[str]:
    """What workers must agree on, a line for each parameter and each group.

    Args:
        infos: the parameters, in order.
        compressor: decides what is compressed and how far.
        settings: names of the group entries that must be equal.
    """
    lines, names = [], sorted(set(settings) - {PER_PARAMETER})
    group: dict[str, Any] | None = None
    for info in infos:
        if info.group is not group:
            group = info.group
            lines += [f"{k}={_plain(group[k])} in the group of {info.name}" for k in names]
        entry, parameter = _entry(info, compressor), info.parameter
        how = "uncompressed" if entry.level is None else f"compressed at level {entry.level}"
        if not parameter.requires_grad:
            how = "frozen"
        kind = f"{parameter.dtype} on {parameter.device.type}".removeprefix("torch.")
        own = overrides_of(info.group, info.position).items()
        how += "".join(f", with {name}={value} of its own" for name, value in own)
        lines.append(f"{info.name}, shape {list(entry.shape)}, {kind}, {how}")
    return lines


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def compare_all(
    groups: Groups, state: Mapping[Tensor, State], compressor: Compressor, settings: Iterable[str]
) -> Exchange[None]:
    """Compares settings, parameters and replicated state, as they are now.

    Args:
        groups: parameter groups.
        state: of the parameters.
        compressor: decides what is compressed and how far.
        settings: names of the group entries that workers must agree on.

    Raises:
        WorkerMismatchError: names the first difference.
    """
    listed = list(list_parameters(groups))
    lines = describe(listed, compressor, settings)
    values = checksums(replicated(listed, state))
    yield from compare(lines, listed[0].parameter.device, values)
