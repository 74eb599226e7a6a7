"""From tensors to buckets: one for each device and dtype, or several of limited size."""

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.interfaces import Compressor, Placement
from efsgd.engine.parameters import ParameterInfo, compute_dtype
from efsgd.layout import Layout
from efsgd.profiling import Phases
from efsgd.wire.control_words import ControlWords
from efsgd.wire.traffic import TrafficCounter

#: What the tensors of a bucket have in common.
Kind: TypeAlias = tuple[torch.device, torch.dtype]

#: For errors and deltas; see `Bucket`.
Memory: TypeAlias = tuple[Tensor, Tensor]


def kind_of(info: ParameterInfo) -> Kind:
    """Where a parameter is, and in which dtype it is computed with."""
    return info.parameter.device, compute_dtype(info.parameter)


def divide(infos: Iterable[ParameterInfo], bucket_bytes: int | None) -> list[list[ParameterInfo]]:
    """The parameters that are trained, by bucket.

    A bucket is full once its gradients have `bucket_bytes`. They are filled from the last parameter
    on, whose gradient a backward pass has first.
    """
    kinds: dict[Kind, list[ParameterInfo]] = {}
    for info in infos:
        if info.is_trained:
            kinds.setdefault(kind_of(info), []).append(info)
    if bucket_bytes is None:
        return list(kinds.values())
    divided: list[list[ParameterInfo]] = []
    for own in kinds.values():
        size = bucket_bytes
        for info in reversed(own):
            if size >= bucket_bytes:
                divided.append([])
                size = 0
            divided[-1].insert(0, info)
            size += info.parameter.numel() * info.parameter.element_size()
    return divided


def make_bucket(
    infos: list[ParameterInfo],
    compressor: Compressor,
    context: tuple[int, int],
    phases: Phases,
    traffic: TrafficCounter,
    memory: Memory | None,
) -> Bucket:
    """A bucket for parameters of one kind, with errors of zero.

    `context` is the number of workers, and this worker; `memory` comes from `memory_of`.
    """
    (device, dtype), (world_size, worker) = kind_of(infos[0]), context
    settings = infos[0].group
    words = ControlWords.count(len(infos), world_size)
    layout = Layout.plan((info.entry_now(compressor) for info in infos), words)
    placement = Placement(dtype, device, worker, world_size)
    aggregator = compressor.aggregator(layout, settings, placement)
    aggregator.groups = {info.index: info.group for info in infos}
    return Bucket(
        layout,
        aggregator,
        ControlWords([info.index for info in infos], world_size, worker),
        dtype,
        device,
        error_feedback=settings["error_feedback"],
        phases=phases,
        traffic=traffic,
        memory=memory,
    )


def memory_of(
    buckets: Iterable[Bucket],
    before: Iterable[ParameterInfo],
    divided: Iterable[list[ParameterInfo]],
    compressor: Compressor,
) -> list[Memory | None]:
    """Memory of old `buckets` for each new one, where it compresses the same tensors.

    Scratch becomes the new errors, into which the old ones are copied, and these become the new
    scratch: nothing is allocated, and nothing is written over that has not been copied. `before`
    are the parameters that the old ones were made for, `divided` those of the new ones.
    """
    parameters = {info.index: info.parameter for info in before}
    old = {bucket.compressed: bucket for bucket in buckets if bucket.compressed}
    found: list[Memory | None] = []
    for infos in divided:
        own = [info for info in infos if info.entry_now(compressor).level is not None]
        bucket = old.get(frozenset(info.index for info in own))
        if bucket is None or bucket.errors is None or not infos[0].group["error_feedback"]:
            found.append(None)
            continue
        errors, deltas = bucket.errors.flat, bucket.deltas.flat
        is_same = kind_of(infos[0]) == (bucket.device, deltas.dtype)
        is_same = is_same and all(parameters[info.index] is info.parameter for info in own)
        is_same = is_same and errors.numel() == sum(info.shape.numel() for info in own)
        found.append((deltas, errors) if is_same else None)
    return found
