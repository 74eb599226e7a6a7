"""What workers must have in common, compared or given by one to the others; and what not."""

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Compressor
from efsgd.checks import plain
from efsgd.engine.parameters import (
    PER_PARAMETER,
    Groups,
    ParameterInfo,
    device_of,
    list_parameters,
    overrides_of,
)
from efsgd.engine.state import State, local_state
from efsgd.engine.update import Method
from efsgd.wire.collectives import Exchange
from efsgd.wire.compare import broadcast_values, checksums, compare
from efsgd.wire.control_words import DIGESTS


def replicated(
    infos: Iterable[ParameterInfo], state: Mapping[Tensor, State], compressor: Compressor
) -> dict[str, Tensor]:
    """What must be equal on all workers, by name: parameters and state, but for what is local."""
    chosen, local = [info for info in infos if info.is_trained], local_state(compressor)
    named = {info.name: info.values.detach() for info in chosen}
    for info in chosen:
        for key, value in sorted(state.get(info.parameter, {}).items()):
            if key not in local and isinstance(value, Tensor):
                named[f"{key} of {info.name}"] = value
    return named


def describe(infos: Iterable[ParameterInfo], method: Method) -> list[str]:
    """What workers must agree on, a line for each parameter and each group."""
    lines: list[str] = []
    group: dict[str, Any] | None = None
    for info in infos:
        if info.group is not group:
            group = info.group
            said = settings_said(group, method).items()
            lines += [f"{name}={value} in the group of {info.name}" for name, value in said]
        if not info.is_trained:
            lines.append(f"{info.name}, frozen")
            continue
        entry, parameter = info.entry_now(method.compressor), info.parameter
        how = "uncompressed" if entry.level is None else f"compressed at level {entry.level}"
        kind = f"{parameter.dtype} on {parameter.device.type}".removeprefix("torch.")
        own = overrides_of(info.group, info.position).items()
        how += "".join(f", with {name}={value} of its own" for name, value in own)
        lines.append(f"{info.name}, shape {list(entry.shape)}, {kind}, {how}")
    return lines


def settings_said(group: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """What a group says that workers must agree on; numbers are the same whatever their type."""
    names = sorted(set(method.compared) - {PER_PARAMETER})
    names.sort(key=lambda name: name != "compressor")  # the first difference is what errors name
    return {name: _plain(group[name]) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    value = plain(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def digest_of(groups: Iterable[Mapping[str, Any]], method: Method) -> int:
    """A digest of what groups with parameters say, but for counters."""
    filled = (group for group in groups if group["params"])
    said = [{**settings_said(group, method), "step": None} for group in filled]
    return zlib.crc32(repr(said).encode()) % DIGESTS


def compare_all(groups: Groups, state: Mapping[Tensor, State], method: Method) -> Exchange[None]:
    """Compares settings, parameters and replicated state; a difference is a WorkerMismatchError."""
    infos = list(list_parameters(groups))
    values = checksums(replicated(infos, state, method.compressor))
    yield from compare(describe(infos, method), device_of(groups), values)


def broadcast_parameters(groups: Groups, method: Method, source: int) -> Exchange[None]:
    """Gives all workers the parameters of one, once it is known that they have the same list."""
    infos = list(list_parameters(groups))
    yield from compare(describe(infos, method), device_of(groups))
    yield from broadcast_values([info.values for info in infos if info.is_trained], source)


def drop_foreign_errors_(
    saved: tuple[int, int],
    state: Mapping[Any, Any],
    compressor: Compressor,
    context: tuple[int, int],
) -> str | None:
    """Zeroes loaded errors that are those of another worker, and returns what to warn of.

    If all workers kept them they would count several times, and in place of the workers' own. Local
    momenta are kept, whoever's they are: each is an estimate of the same mean gradient, counts
    once in each vote, and is soon forgotten. Those saved by one worker are the mean over all.

    Args:
        saved: the number of workers whose errors were loaded, and which of them.
        state: of all parameters (errors are modified in place).
        compressor: says what else is local.
        context: the number of workers now, and this worker.
    """
    world_size, worker = context
    if saved[0] <= 1 or saved == context:
        return None
    states = [own for own in state.values() if isinstance(own, Mapping)]
    errors = [own["error"] for own in states if "error" in own]
    others = [own[name] for name in compressor.local_state for own in states if name in own]
    what, effect = "errors", "left out, and what they had yet to send is lost"
    if not any(map(torch.any, errors)):
        if not any(map(torch.any, others)):
            return None
        what, effect = "local momenta", "kept, but training goes on differently until they fade"
    for error in errors:
        error.zero_()
    return (
        f"The {what} that were loaded are those of worker {saved[1]} of {saved[0]}, and this is "
        f"worker {worker} of {world_size}: they were {effect}. "
        f"Save efsgd.checkpoint.consolidated_state_dict(optimizer), or call "
        f"efsgd.checkpoint.average_errors_(optimizer) on every worker before saving (with "
        f"efsgd.attach, attached.consolidate()), or let every worker save and load a state_dict of "
        f"its own."
    )
