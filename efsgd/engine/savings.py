"""Whether compression saves bytes: said once, after a step, where it hardly does, and why."""

import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from efsgd.algorithms.interfaces import Compressor, Placement
from efsgd.engine.parameters import ParameterInfo
from efsgd.engine.plan import Plan
from efsgd.layout import Layout, matrix_shape
from efsgd.wire.traffic import TrafficCounter

# What becomes of tensors that are not made smaller, and why.
_SPARSE = "tensors with sparse gradients, which are sent dense and uncompressed"
_CHOSEN = "tensors that their group has sent uncompressed"
_VECTORS = "vectors, which are sent uncompressed"
_THIN = "matrices too thin to be compressed, as LoRA's are"
_SMALL = "matrices too small to be compressed"

# A matrix is thin where one side is so many times the other.
_THIN_RATIO = 8


class Savings:
    """Looks at the first compressed steps, one of each kind.

    `is_known` says that nothing is left to look at.
    """

    def __init__(self, compressor: Compressor) -> None:
        self.is_known, self._compressor = False, compressor
        self._kinds: set[Hashable] = set()

    def judge(
        self, plan: Plan, traffic: TrafficCounter, step: int, shared: Mapping[str, Any]
    ) -> str | None:
        """After a step that was applied. Returns what to warn of.

        `shared` are settings of the optimizer as a whole.
        """
        if step < shared["start_compressing_at"] or not plan.nbytes:
            return None
        sent, kind = traffic.report()["bytes_sent"], self._compressor.step_kind
        self._kinds.add(kind(step, shared))
        self.is_known = not _is_little(sent, plan.nbytes)
        if self.is_known or kind(step + 1, shared) not in self._kinds:
            return None
        self.is_known = True
        return _describe(plan, self._compressor, sent, step, shared)


def _is_little(sent: int, uncompressed: int) -> bool:
    """Whether less than a fifth is saved."""
    return 5 * sent > 4 * uncompressed


def _describe(
    plan: Plan, compressor: Compressor, sent: int, step: int, shared: Mapping[str, Any]
) -> str | None:
    """Says where the bytes are, and what to do; None where nothing is meant to be compressed."""
    infos = [info for info in plan.infos if info.is_trained and info.shape.numel()]
    reasons: dict[str, list[ParameterInfo]] = {}
    for info in infos:
        reasons.setdefault(_reason(info, compressor, plan, sent), []).append(info)
    if list(reasons) == [_CHOSEN]:
        return None
    clauses = []
    for reason, own in sorted(reasons.items(), key=lambda item: -_nbytes(item[1])):
        shape = list(max(own, key=_size_of).parameter.shape)
        which = f"1, {shape}" if len(own) == 1 else f"{len(own)}, the largest {shape}"
        clauses.append(f"{_nbytes(own):,} are in {reason} ({which})")
    words = sum(b.layout.control_words * b.deltas.flat.itemsize for b in plan.buckets)
    if 20 * words > plan.nbytes:
        clauses.append(f"control words, one for each tensor and each worker, add {words:,}")
    if narrow := {info.parameter.dtype for info in infos if info.parameter.itemsize < 4}:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in narrow))
        clauses.append(f"gradients of {names} are sent as float32")
    remedies = [*_remedies(plan, compressor, reasons, step - shared["start_compressing_at"])]
    remedies.append(
        "Otherwise have the compressor send less, or train without compression: by "
        "DistributedDataParallel alone; or with min_compression_rate=math.inf, or Identity() as "
        "the compressor, which end this warning, too."
    )
    return (
        f"Compression saves little: step {step} has sent {sent:,} bytes, and gradients without "
        f"compression have {plan.nbytes:,}. Of these, {'; '.join(clauses)}. {' '.join(remedies)}"
    )


def _size_of(info: ParameterInfo) -> int:
    return info.parameter.numel()


def _nbytes(infos: list[ParameterInfo]) -> int:
    return sum(info.parameter.numel() * info.parameter.itemsize for info in infos)


def _reason(info: ParameterInfo, compressor: Compressor, plan: Plan, sent: int) -> str:
    """What becomes of a parameter's gradient, and why."""
    settings, shape = info.settings, info.compressed_shape(compressor)
    batch_dims = compressor.batch_dims_of(settings)
    if info.has_sparse_gradients:
        return _SPARSE
    if info.entry_now(compressor).level is not None:
        others = sum(b.layout.vector_floats * b.deltas.flat.itemsize for b in plan.buckets)
        return f"tensors that are compressed to {sent - others:,} bytes"
    huge = (*(1,) * batch_dims, 1 << 30, 1 << 30)
    if compressor.level(huge, settings) is None:  # nothing would ever be compressed
        return _CHOSEN
    if len(shape) < batch_dims + 2:
        return _VECTORS
    sides = sorted(matrix_shape(shape, batch_dims))
    return _THIN if sides[1] >= _THIN_RATIO * sides[0] else _SMALL


def _remedies(
    plan: Plan, compressor: Compressor, reasons: Mapping[str, list[ParameterInfo]], since: int
) -> Iterator[str]:
    if _SPARSE in reasons:
        yield "With dense gradients (sparse=False in nn.Embedding) they could be compressed."
    single = [info for own in reasons.values() for info in own if info.parameter.dim() >= 3]
    is_stack = any(info.entry_now(compressor).level is None for info in single)
    if is_stack and hasattr(compressor, "batch_dims"):
        yield "If the first dimension counts matrices, as of experts, set batch_dims=1."
    rank = max([i.settings.get("rank") or 0 for own in reasons.values() for i in own])
    while (rank := rank // 2) >= 1:
        would_send = _bytes_at(rank, plan, compressor, since)
        if not _is_little(would_send, plan.nbytes):
            yield f"With rank={rank} a step sends {would_send:,} bytes."
            return


def _bytes_at(rank: int, plan: Plan, compressor: Compressor, since: int) -> int:
    """What a step would send if the setting `rank` were this in all groups."""
    total, infos = 0, {info.index: info for info in plan.infos}
    for bucket in plan.buckets:
        entries = []
        for entry in bucket.layout.entries:
            info = infos[entry.index]
            settings = {**info.settings, "rank": rank}
            if not info.has_sparse_gradients:
                level = compressor.level(info.compressed_shape(compressor), settings)
                entry = dataclasses.replace(info.entry(compressor), level=level)
            entries.append(entry)
        layout = Layout.plan(entries, bucket.layout.control_words)
        dtype, (world_size, worker) = bucket.deltas.flat.dtype, plan.context
        placement = Placement(dtype, bucket.device, worker, world_size)
        total += layout.vector_floats * dtype.itemsize
        total += compressor.compressed_bytes(layout, placement, since)
    return total
