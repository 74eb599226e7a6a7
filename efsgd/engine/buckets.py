"""From parameter groups to buckets: one for each device and dtype, made anew when they change."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.interfaces import Aggregator, Compressor
from efsgd.engine.parameters import ParameterInfo, compute_dtype, frozen
from efsgd.engine.state import State, attach_, release_zero_errors_
from efsgd.layout import Entry, Layout
from efsgd.profiling import Phases
from efsgd.wire.control_words import ControlWords

#: What the tensors of a bucket have in common.
Kind: TypeAlias = tuple[torch.device, torch.dtype]


def signature(
    groups: Iterable[Mapping[str, Any]],
    state: Mapping[Tensor, State],
    compressor: Compressor,
) -> Hashable:
    """All that buckets depend on, except for what changes by itself on all workers alike.

    Args:
        groups: of the optimizer.
        state: of its parameters.
        compressor: whose settings are read from the groups.
    """
    settings = tuple(compressor.settings())
    return tuple(
        (
            id(group),
            tuple(group[name] for name in settings),
            frozen(group),
            group["error_feedback"],
            group.get("momentum", 0) != 0,
            group["start_compressing_at"],
            group["check_every"],
            tuple(
                (id(p), id(state.get(p)), p.requires_grad, p.dtype, p.device, p.shape)
                for p in group["params"]
            ),
        )
        for group in groups
    )


def memory_of(
    buckets: Iterable[Bucket], infos: Iterable[ParameterInfo], compressor: Compressor
) -> dict[Kind, tuple[Tensor, Tensor]]:
    """Buffers of buckets that those after them can have, as they compress the same tensors.

    Scratch becomes the new errors, into which `attach_` copies the old ones, and these become the
    new scratch: nothing is allocated, and nothing is written over that has not been copied.

    Args:
        buckets: that are given up once new ones are made.
        infos: the parameters of the new ones.
        compressor: decides what is compressed.

    Returns:
        By device and dtype, for errors and deltas; see `Bucket`.
    """
    kinds, found = _by_kind(infos), {}
    for bucket in buckets:
        kind, errors = (bucket.device, bucket.deltas.flat.dtype), bucket.errors
        own = [m for m in kinds.get(kind, []) if _entry(m, compressor).level is not None]
        if errors is None or not all(info.group["error_feedback"] for info in own):
            continue
        is_same = bucket.compressed == {info.index for info in own}
        is_same = is_same and all(bucket.parameters[m.index] is m.parameter for m in own)
        if is_same and errors.flat.numel() == sum(m.shape.numel() for m in own):
            found[kind] = bucket.deltas.flat, errors.flat
    return found


def _by_kind(infos: Iterable[ParameterInfo]) -> dict[Kind, list[ParameterInfo]]:
    """The parameters that require a gradient."""
    kinds: dict[Kind, list[ParameterInfo]] = {}
    for info in infos:
        if info.parameter.requires_grad:
            kind = info.parameter.device, compute_dtype(info.parameter)
            kinds.setdefault(kind, []).append(info)
    return kinds


def make_buckets(
    infos: Iterable[ParameterInfo],
    states: Mapping[int, State],
    compressor: Compressor,
    world_size: int,
    worker: int,
    phases: Phases,
    prepare: Callable[[Aggregator, list[ParameterInfo]], None],
    memory: Mapping[Kind, tuple[Tensor, Tensor]],
) -> list[Bucket]:
    """Plans and fills the buckets of all parameters that require a gradient.

    Args:
        infos: the parameters, in order.
        states: of each, complete; errors and factors become views (modified in place).
        compressor: decides what is compressed and how far.
        world_size: the number of workers.
        worker: this worker.
        phases: names the phases of a step.
        prepare: called with each new aggregator and the parameters it works for, while the large
            buffers are not allocated yet.
        memory: of `memory_of`.
    """
    buckets = []
    release_zero_errors_(states.values(), [buffer for pair in memory.values() for buffer in pair])
    for (device, dtype), alike in _by_kind(infos).items():
        words = ControlWords.count(len(alike), world_size)
        layout = Layout.plan((_entry(info, compressor) for info in alike), words)
        options = alike[0].group
        aggregator = compressor.aggregator(layout, options, dtype, device, worker, world_size)
        prepare(aggregator, alike)
        bucket = Bucket(
            layout,
            {info.index: info.parameter for info in alike},
            aggregator,
            ControlWords([info.index for info in alike], world_size, worker),
            dtype,
            device,
            error_feedback=options["error_feedback"],
            phases=phases,
            memory=memory.get((device, dtype)),
        )
        attach_(bucket, states)
        buckets.append(bucket)
    return buckets


def _entry(info: ParameterInfo, compressor: Compressor) -> Entry:
    is_compressing = info.group["step"] >= info.group["start_compressing_at"]
    return info.entry(compressor, is_compressing=is_compressing)
