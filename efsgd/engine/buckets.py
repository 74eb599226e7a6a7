"""From tensors to buckets: one for each device and dtype."""

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

#: By kind, for errors and deltas; see `Bucket`.
Memory: TypeAlias = dict[Kind, tuple[Tensor, Tensor]]


def by_kind(infos: Iterable[ParameterInfo]) -> dict[Kind, list[ParameterInfo]]:
    """The parameters that are trained, by what a bucket has in common."""
    kinds: dict[Kind, list[ParameterInfo]] = {}
    for info in infos:
        if info.is_trained:
            kind = info.parameter.device, compute_dtype(info.parameter)
            kinds.setdefault(kind, []).append(info)
    return kinds


def make_bucket(
    infos: list[ParameterInfo],
    kind: Kind,
    compressor: Compressor,
    context: tuple[int, int],
    phases: Phases,
    traffic: TrafficCounter,
    memory: tuple[Tensor, Tensor] | None,
) -> Bucket:
    """A bucket for parameters of one kind, with errors of zero.

    `context` is the number of workers, and this worker; `memory` comes from `memory_of`.
    """
    (device, dtype), (world_size, worker), settings = kind, context, infos[0].group
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
    infos: Iterable[ParameterInfo],
    compressor: Compressor,
) -> Memory:
    """Memory of old `buckets` for new ones, where they compress the same tensors.

    Scratch becomes the new errors, into which the old ones are copied, and these become the new
    scratch: nothing is allocated, and nothing is written over that has not been copied. `before`
    are the parameters that the old ones were made for, `infos` those of the new ones.
    """
    kinds, found = by_kind(infos), {}
    parameters = {info.index: info.parameter for info in before}
    for bucket in buckets:
        kind, errors = (bucket.device, bucket.deltas.flat.dtype), bucket.errors
        own = [i for i in kinds.get(kind, []) if i.entry_now(compressor).level is not None]
        if errors is None or not all(info.group["error_feedback"] for info in own):
            continue
        is_same = bucket.compressed == {info.index for info in own}
        is_same = is_same and all(parameters[info.index] is info.parameter for info in own)
        if is_same and errors.flat.numel() == sum(info.shape.numel() for info in own):
            found[kind] = bucket.deltas.flat, errors.flat
    return found
