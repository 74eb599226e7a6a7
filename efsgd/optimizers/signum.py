"""Signum: signSGD with momentum, and a majority vote of the workers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from efsgd.algorithms.error_feedback import add_multiple_, regularize_
from efsgd.algorithms.majority_vote import LOCAL_FORM
from efsgd.compressors.majority_vote import MajorityVote
from efsgd.engine.update import Rule, Rules
from efsgd.optimizers.base import ErrorFeedbackOptimizer
from efsgd.optimizers.settings import number_of, validate_signum_group
from efsgd.wire.transports import Workers


def _rules_of(groups: Iterable[Mapping[str, Any]]) -> Rules:
    rules = {}
    for group in groups:
        options = {
            "lr": number_of(group, "lr"),
            "weight_decay": number_of(group, "weight_decay") or None,
            "maximize": group["maximize"],
            "together": None,
        }
        rules[id(group)] = Rule(signum_, options, keeps_momentum=False)
    return rules


class Signum(ErrorFeedbackOptimizer):
    r"""signSGD with momentum and majority vote: one bit per element, and no error feedback.

    Each worker w calls `step()` with its own, local gradients g_w. Then, with momentum β,

    | m_w ← β m_w + (1 − β) g_w, and m_w ← g_w in a parameter's first step
    | v ← sign(Σ_w sign(m_w)), 0 where as many workers are for as against
    | x ← x − lr (v + weight_decay x)

    Workers send sign(m_w) of all parameters, packed without gaps, and each receives those of all:
    for d elements d bits are sent and W·d received. Momenta are each worker's own. With one worker
    it is signSGD with momentum.

    The sign of zero is +1, since there are two signs to a bit: where the momenta of all workers are
    zero, x moves by −lr. A parameter without a gradient on any worker is left as it is; one
    without a gradient on some workers has a zero there, so that they vote by their momenta. Real
    and imaginary parts of a complex parameter are voted on separately.

    Every element moves by `lr` whatever its gradient is, so `lr` is much smaller than SGD's, about
    Adam's. Votes weigh the same however sure a worker is: the theory asks for noise that is
    symmetric, as it is in large batches.

    The other arguments are those of `PowerSGDOptimizer`.

    Args:
        params: parameters, (name, parameter) pairs, or parameter groups. Names appear in errors.
            `lr`, `momentum`, `weight_decay` and `maximize` may be set per group.
        lr: learning rate, by which every element moves.
        momentum: β, at least 0 and below 1; the same weight for old and new as in Adam.
        weight_decay: multiple of the parameters that is added to the vote.
        maximize: ascend instead of descending.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from efsgd.optimizers.signum import Signum
        >>> x = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> optimizer = Signum([x], lr=0.5)
        >>> x.square().sum().backward()
        >>> optimizer.step()
        >>> x.tolist()
        [0.5, -1.5]

    Source: Bernstein et al., ICML 2018, arXiv 1802.04434, and ICLR 2019, arXiv 1810.05291; the
    first step and the decay as in the experiments of Vogels et al., NeurIPS 2019, arXiv 1905.13727.
    """

    # As in `efsgd.ErrorFeedbackSGD`: the workers decide together what is skipped.
    _step_supports_amp_scaling = True

    _telling_settings = ("momentum_form",)
    _takes_sparse = False  # it sends a sign for every element all the same
    _validate = _validate_again = staticmethod(validate_signum_group)
    _rules = staticmethod(_rules_of)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        nonfinite: str = "raise",
        check_every: int = 0,
        bucket_bytes: int | None = None,
        process_group: Workers = None,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "momentum_form": LOCAL_FORM,
            "error_feedback": False,
            "start_compressing_at": 0,
            "nonfinite": nonfinite,
            "max_grad_norm": None,
            "check_every": check_every,
            "bucket_bytes": bucket_bytes,
        }
        super().__init__(params, defaults, MajorityVote(), process_group)


def signum_(
    votes: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    lr: float,
    weight_decay: float | None = None,
    maximize: bool = False,
    together: bool = False,
) -> None:
    """Moves by votes: x ← x − lr (v + weight_decay x). Both lists are modified in place.

    Sums are rounded to the dtype of x once. `maximize` leaves the decay what it is. With `together`
    many tensors of one dtype share a kernel.

    Example:
        >>> from efsgd.optimizers.signum import signum_
        >>> x = torch.tensor([4.0, 4.0, 4.0])
        >>> signum_([torch.tensor([1.0, -1.0, 0.0])], [x], lr=0.5, weight_decay=0.25)
        >>> x
        tensor([3.0000, 4.0000, 3.5000])
    """
    for x, vote in zip(parameters, votes, strict=True):
        regularize_(vote, x, weight_decay=weight_decay, maximize=maximize)
    if together and len({tensor.dtype for tensor in (*parameters, *votes)}) == 1:
        torch._foreach_add_(list(parameters), list(votes), alpha=-lr)
        return
    for x, vote in zip(parameters, votes, strict=True):
        add_multiple_(x, -lr, vote)
