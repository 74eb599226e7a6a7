"""Distributed error-feedback SGD with momentum, for any compressor.

Source: Vogels, Karimireddy, Jaggi: "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization", NeurIPS 2019, arXiv 1905.13727. Algorithm 2, whose lines are marked.

Legend. Δ_w: `deltas`; e_w: `errors`; Δ': `updates`; m: `momenta`; x: `parameters`;
γ: `lr`; λ: `momentum`.

A step is a transaction. Lines 7 to 10 (`exchange_gradients`) write to scratch memory only. Once
every worker is known to agree, `commit_` makes the scratch the memory, and lines 11 to 13 follow.
They need no other worker, and all they touch has been checked before the first collective.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.interfaces import Compressed
from efsgd.errors import CollectiveError
from efsgd.layout import Blocks, Elementwise, real_view
from efsgd.wire.collectives import Exchange
from efsgd.wire.control_words import Abstention, Verdict, all_finite
from efsgd.wire.late_errors import spoil_rest


@dataclass(frozen=True)
class Outcome:
    """What came of lines 7 to 10.

    Attributes:
        mean: C(Δ), the same on every worker; None where this worker could not compute it.
        verdict: whether the step may be applied; the same on every worker.
        error: why this worker could not take part.
    """

    mean: Compressed | None
    verdict: Verdict
    error: Exception | None = None

    @property
    def is_usual(self) -> bool:
        """Whether all workers took part in the step, and it may be applied."""
        verdict = self.verdict
        return self.error is None and verdict.is_good and not verdict.sparse


def exchange_gradients(
    bucket: Bucket,
    gradients: Mapping[int, Tensor | None],
    step: int,
    scale: float = 1.0,
    *,
    has_overflowed: bool = False,
    is_scaled: bool = False,
    abstains: Abstention | None = None,
    digest: int = 0,
) -> Exchange[Outcome]:
    """Algorithm 2, lines 7 to 10: from each worker's gradients to the mean of what they sent.

    A worker that meets an error before it has sent anything takes part with zeros, and says so; one
    that meets it later spoils what is left, so that no worker applies the step. After the last
    collective nobody hears of it.

    Args:
        bucket: only its scratch is modified.
        gradients: g_w of line 6 by index, for every tensor of the bucket, in the layout's order.
        step: the number of the step, from 0.
        scale: the gradients are multiplied by this (loss scaling in mixed precision).
        has_overflowed: it is known already that a gradient of this worker is not finite.
        is_scaled: the gradients are those of a scaled loss.
        abstains: why this worker takes part with zeros alone, if it does.
        digest: of this worker's settings, which must be those of all others.
    """
    aggregator, deltas, traffic = bucket.aggregator, bucket.deltas, bucket.traffic
    record = traffic.record if abstains is None else traffic.record_check
    failure: Exception | None = None
    if abstains is None:
        try:
            with bucket.phases("Alg. 2, line 7: add errors and gradients"):
                aggregator.add_ahead_(deltas, bucket.errors, gradients, scale, step)
                add_errors_and_gradients_(deltas, bucket, gradients, scale)  # Alg. 2, line 7
        except Exception as error:  # the other workers are waiting, so it is raised afterwards
            failure, abstains = error, "unable"
    is_good = abstains is None and (aggregator.shows_nonfinite or all_finite(deltas.flat))
    if not is_good:
        deltas.flat.zero_()

    def lines_8_to_10() -> Exchange[Compressed]:
        local = yield from aggregator.compress(deltas, step)  # Alg. 2, line 8
        if bucket.errors is not None:
            with bucket.phases("Alg. 2, line 9: new errors"):
                local.subtract_from_(deltas)  # Alg. 2, line 9
        return (yield from aggregator.aggregate(local))  # Alg. 2, line 10

    aggregator.abstains = abstains is not None
    try:
        mean, verdict = yield from bucket.control.attach_control_words(
            lines_8_to_10(),
            aggregator.vectors[: bucket.layout.control_words],
            list(gradients.values()),
            record,
            has_overflowed=has_overflowed or not is_good,
            is_scaled=is_scaled,
            abstains=abstains,
            digest=digest,
        )
    except CollectiveError:
        raise
    except Exception as error:
        if abstains is not None:
            raise
        if bucket.control.sent:  # the others count on the rest
            bucket.late_error = error
            deltas.flat.zero_()
            aggregator.abstains = True
            rest = spoil_rest(lines_8_to_10(), bucket.control, traffic.record_check)
            return Outcome(None, Verdict(frozenset(), {}, overflowed=(yield from rest)), error)
        unable = exchange_gradients(bucket, gradients, step, is_scaled=is_scaled, abstains="unable")
        return dataclasses.replace((yield from unable), error=error)
    return Outcome(mean, verdict.with_mean(is_finite=mean.is_finite), failure)


def decompress_with_(
    bucket: Bucket,
    mean: Compressed,
    function: Elementwise,
    *operands: Mapping[int, Tensor],
    **options: Any,
) -> None:
    """Algorithm 2, line 11: hands Δ' to `function`, a few tensors or chunks of them at a time."""
    mean.decompress_with_(function, *operands, **options)  # Alg. 2, line 11
    values: list[Tensor] = []
    others: list[list[Tensor]] = [[] for _ in operands]
    for entry in bucket.layout.vectors:
        if entry.index in operands[0]:
            values.append(bucket.deltas.views[entry.index])
            for own, operand in zip(others, operands, strict=True):
                own.append(operand[entry.index])
    if values:
        function(values, *others, **options)


def add_errors_and_gradients_(
    deltas: Blocks, bucket: Bucket, gradients: Mapping[int, Tensor | None], scale: float = 1.0
) -> None:
    """Δ_w = g_w + e_w for each tensor of `bucket`, written to `deltas` (modified in place).

    A missing gradient is zero, a sparse one is made dense, a complex one is its real view. A tensor
    that is sent uncompressed has no error. What was added ahead is left out.
    """
    for indices, place in bucket.runs:
        own = [gradients[index] for index in indices]
        views = [deltas.views[index] for index in indices]
        if bucket.errors is not None and len(own) == 1 and own[0] is not None:
            error = bucket.errors.views[indices[0]]
            torch.add(error, real_view(own[0]), alpha=scale, out=views[0])
            continue
        delta = deltas.flat[place]
        copy_gradients_(own, views)
        if bucket.errors is not None:
            torch.add(bucket.errors.flat[place], delta, alpha=scale, out=delta)
        elif scale != 1.0:
            delta.mul_(scale)
    indices = tuple(entry.index for entry in bucket.layout.vectors)
    copy_gradients_([gradients[i] for i in indices], [deltas.views[i] for i in indices])
    if scale != 1.0:
        bucket.aggregator.vectors[bucket.layout.control_words :].mul_(scale)
    for index, error in bucket.pending_errors.items():
        gradient, delta = gradients[index], deltas.views[index]
        if gradient is None:
            delta.copy_(error)
        else:
            torch.add(error, real_view(gradient), alpha=scale, out=delta)


def copy_gradients_(gradients: Sequence[Tensor | None], targets: Sequence[Tensor]) -> None:
    """Copies gradients, of which some may be missing, sparse or complex, to dense real tensors."""
    given, taken, missing = [], [], []
    for gradient, target in zip(gradients, targets, strict=True):
        if gradient is None:
            missing.append(target)
        else:
            given.append(real_view(gradient))
            taken.append(target)
    if given:
        torch._foreach_copy_(taken, given)
    if missing:
        torch._foreach_zero_(missing)


def descend_(
    updates: Sequence[Tensor],
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor | None = None,
    maximize: bool = False,
    together: bool | None = False,
    clip: float | Tensor | None = None,
) -> None:
    """Algorithm 2, lines 12 and 13, with weight decay on the aggregated update.

    Args:
        updates: Δ', each of the shape of its parameter (modified in place). They may have more
            digits than the parameters; sums are rounded once.
        parameters: x (modified in place).
        momenta: m (modified in place); None where λ has been 0 always, since then m = Δ'.
        lr: γ.
        momentum: λ.
        weight_decay: multiple of x that is added to Δ'; the same on every worker, so it is
            neither compressed nor kept in the errors.
        maximize: ascend instead.
        together: whether many tensors share a kernel, where all have one dtype; None: they do not.
        clip: Δ' is multiplied by this first.

    Example:
        >>> from efsgd.algorithms.error_feedback import descend_
        >>> x, m = torch.tensor([1.0]), torch.tensor([2.0])
        >>> descend_([torch.tensor([4.0])], [x], [m], lr=0.5, momentum=0.5)
        >>> m, x  # 0.5 * 2 + 4 and 1 - 0.5 * (4 + 5)
        (tensor([5.]), tensor([-3.5000]))
    """
    if clip is not None or maximize or weight_decay is not None:
        for x, update in zip(parameters, updates, strict=True):
            regularize_(update, x, weight_decay=weight_decay, maximize=maximize, clip=clip)
    dtype, steps = parameters[0].dtype, updates if momenta is None else momenta
    is_uniform = all([t.dtype == dtype for tensors in (parameters, updates) for t in tensors])
    if is_uniform and isinstance(lr, float) and isinstance(momentum, float):
        if momenta is not None and together:
            torch._foreach_mul_(list(momenta), momentum)
            torch._foreach_add_(list(momenta), list(updates))
        for m, update in zip(() if momenta is None or together else momenta, updates, strict=False):
            torch.add(update, m, alpha=momentum, out=m)  # Alg. 2, line 12
        torch._foreach_add_(list(updates), list(steps))
        torch._foreach_add_(list(parameters), list(updates), alpha=-lr)  # Alg. 2, line 13
        return
    for x, update, m in zip(parameters, updates, steps, strict=True):
        if m is not update:
            add_multiple_(update, momentum, m, out=m)
        add_multiple_(x, -lr, update.add_(m))


def regularize_(
    update: Tensor,
    x: Tensor,
    *,
    weight_decay: float | Tensor | None,
    maximize: bool,
    clip: float | Tensor | None = None,
) -> None:
    """Clips Δ', turns it around to ascend, and adds the multiple of x to it (modified in place)."""
    if clip is not None:
        update.mul_(clip)
    if maximize:
        update.neg_()
    if weight_decay is not None:
        add_multiple_(update, weight_decay, x)


def add_multiple_(x: Tensor, factor: float | Tensor, y: Tensor, out: Tensor | None = None) -> None:
    """Writes x + factor·y to `out` (by default to x), rounded once at the end.

    Args:
        x: summand.
        factor: a number; as a tensor in compiled code, which is then the same for every number.
        y: summand.
        out: where the sum is written.
    """
    out = x if out is None else out
    if isinstance(factor, Tensor):
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        out.copy_(x.to(wide) + factor * y.to(wide))
    else:
        torch.add(x, y, alpha=factor, out=out)
