"""Distributed error-feedback SGD with momentum, for any compressor.

Source: Vogels, Karimireddy, Jaggi: "PowerSGD: Practical Low-Rank Gradient Compression for
Distributed Optimization", NeurIPS 2019, arXiv 1905.13727. Algorithm 2, whose lines are marked.

Legend. Δ_w: `deltas`; e_w: `errors`; Δ': `updates`; m: `momenta`; x: `parameters`;
γ: `lr`; λ: `momentum`.

A step is a transaction. Lines 7 to 10 (`exchange_gradients`) write to scratch memory only. Once
every worker is known to agree, `commit_` makes the scratch the memory, and lines 11 to 13 follow.
They need no other worker, and all they touch has been checked before the first collective.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from efsgd.algorithms.bucket import Bucket
from efsgd.algorithms.interfaces import Compressed
from efsgd.layout import Blocks, Elementwise, real_view
from efsgd.wire.collectives import Exchange
from efsgd.wire.control_words import Verdict, all_finite


@dataclass(frozen=True)
class Outcome:
    """What came of lines 7 to 10.

    Attributes:
        mean: C(Δ), the same on every worker; None where it could not be computed.
        verdict: whether the step may be applied; the same on every worker.
        obstacle: the error because of which this worker could not take part.
    """

    mean: Compressed | None
    verdict: Verdict
    obstacle: Exception | None


def exchange_gradients(
    bucket: Bucket,
    step: int,
    scale: float = 1.0,
    *,
    has_overflowed: bool = False,
    is_scaled: bool = False,
) -> Exchange[Outcome]:
    """Algorithm 2, lines 7 to 10: from each worker's gradients to the mean of what they sent.

    Args:
        bucket: whose `parameters` have the gradients g_w of line 6. Only scratch is modified.
        step: the number of the step, from 0.
        scale: the gradients are multiplied by this (loss scaling in mixed precision).
        has_overflowed: it is known already that a gradient of this worker is not finite.
        is_scaled: the gradients are those of a scaled loss.
    """
    aggregator, deltas = bucket.aggregator, bucket.deltas
    obstacle: Exception | None = None
    try:
        with bucket.phases("Alg. 2, line 7: add errors and gradients"):
            add_errors_and_gradients_(deltas, bucket, scale)  # Alg. 2, line 7
    except Exception as error:  # the other workers are waiting, so it is raised afterwards
        obstacle = error
    is_good = obstacle is None and (aggregator.shows_nonfinite or all_finite(deltas.flat))
    if not is_good:
        deltas.flat.zero_()

    def lines_8_to_10() -> Exchange[Compressed]:
        local = yield from aggregator.compress(deltas, step)  # Alg. 2, line 8
        if bucket.errors is not None:
            with bucket.phases("Alg. 2, line 9: new errors"):
                local.subtract_from_(deltas)  # Alg. 2, line 9
        return (yield from aggregator.aggregate(local))  # Alg. 2, line 10

    mean, verdict = yield from bucket.control.attach_control_words(
        lines_8_to_10(),
        aggregator.vectors[: bucket.layout.control_words],
        bucket.gradients(),
        has_overflowed=has_overflowed or not is_good,
        is_unable=obstacle is not None,
        is_scaled=is_scaled,
    )
    return Outcome(mean, verdict.with_mean(is_finite=mean.is_finite), obstacle)


def decompress_with_(
    bucket: Bucket,
    mean: Compressed,
    function: Elementwise,
    *operands: Mapping[int, Tensor],
    **options: Any,
) -> None:
    """Algorithm 2, line 11: hands Δ' to `function`, a few tensors or pieces of them at a time.

    Args:
        bucket: after `commit_`.
        mean: C(Δ).
        function: is given a list of pieces of Δ', which it may modify, and for each operand the
            list of its like pieces.
        operands: tensors by parameter index, all with the same indices (modified in place).
        options: passed on to `function`.
    """
    mean.decompress_with_(function, *operands, **options)  # Alg. 2, line 11
    vectors = [entry.index for entry in bucket.layout.vectors if entry.index in operands[0]]
    if vectors:
        values = [bucket.deltas.views[index] for index in vectors]
        function(values, *([each[index] for index in vectors] for each in operands), **options)


def add_errors_and_gradients_(deltas: Blocks, bucket: Bucket, scale: float = 1.0) -> None:
    """Δ_w = g_w + e_w for each tensor of `bucket`, written to `deltas` (modified in place).

    A missing gradient is zero, a sparse one is made dense, a complex one is its real view. A tensor
    that is sent uncompressed has no error.
    """
    for index, parameter in bucket.parameters.items():
        delta, error = deltas.views[index], bucket.error_of(index)
        gradient = None if parameter.grad is None else real_view(parameter.grad)
        if gradient is None:
            delta.zero_() if error is None else delta.copy_(error)
        elif error is not None:
            torch.add(error, gradient, alpha=scale, out=delta)
        elif scale == 1.0:
            delta.copy_(gradient)
        else:
            torch.mul(gradient, scale, out=delta)


def descend_(
    updates: Sequence[Tensor],
    parameters: Sequence[Tensor],
    momenta: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    weight_decay: float | Tensor | None = None,
    maximize: bool = False,
    together: bool = False,
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
        together: whether many tensors share a kernel, where all have one dtype: on accelerators.
        clip: Δ' is multiplied by this first.

    Example:
        >>> from efsgd.algorithms.error_feedback import descend_
        >>> x, m = torch.tensor([1.0]), torch.tensor([2.0])
        >>> descend_([torch.tensor([4.0])], [x], [m], lr=0.5, momentum=0.5)
        >>> m, x  # 0.5 * 2 + 4 and 1 - 0.5 * (4 + 5)
        (tensor([5.]), tensor([-3.5000]))
    """
    for x, update in zip(parameters, updates, strict=True):
        regularize_(update, x, weight_decay=weight_decay, maximize=maximize, clip=clip)
    is_uniform = len({tensor.dtype for tensor in (*parameters, *updates)}) == 1
    if together and is_uniform and isinstance(lr, float) and isinstance(momentum, float):
        deltas, steps = list(updates), list(updates if momenta is None else momenta)
        if momenta is not None:
            torch._foreach_mul_(steps, momentum)
            torch._foreach_add_(steps, deltas)
        torch._foreach_add_(deltas, steps)
        torch._foreach_add_(list(parameters), deltas, alpha=-lr)
        return
    for position, (x, update) in enumerate(zip(parameters, updates, strict=True)):
        m = update
        if momenta is not None:
            m = momenta[position]
            add_multiple_(update, momentum, m, out=m)  # Alg. 2, line 12
        add_multiple_(x, -lr, update.add_(m))  # Alg. 2, line 13


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
