"""Membership inference: was this sample among those that were trained on, or in this batch?

A loss below a threshold: Yeom, Giacomelli, Fredrikson and Jha, arXiv:1709.01604. The gradient of a
sample beside the update: Nasr, Shokri and Houmansadr, arXiv:1812.00910. Likelihood ratios from
models with and without the sample: Carlini et al., arXiv:2112.03570.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from efsgd.audit.objective import FrozenModel, Loss
from efsgd.audit.observed import Message
from efsgd.checks import require_number


def loss_scores(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, loss: Loss = cross_entropy
) -> Tensor:
    """Of each sample the negative loss: the more a model knows it, the more likely a member.

    Args:
        model: as trained; evaluation mode is best. It is not modified.
        inputs: [samples, ...].
        labels: [samples].
        loss: of outputs and labels, a scalar.

    Returns:
        Scores, [samples], for `separation`.

    Example:
        >>> from efsgd.audit import loss_scores
        >>> loss_scores(torch.nn.Identity(), torch.zeros(1, 2), torch.tensor([0]))
        tensor([-0.6931])
    """
    with torch.no_grad():
        outputs = model(inputs)
        pairs = zip(outputs.split(1), labels.split(1), strict=True)
        return -torch.stack([loss(output, label) for output, label in pairs])


def update_scores(
    message: Message,
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    loss: Loss = cross_entropy,
    parameters: Sequence[Tensor] | None = None,
) -> Tensor:
    """Of each sample its gradient's product with a message, in relation to the gradient's length.

    A batch's mean gradient holds that of each member, one n-th of its square in the product; of
    others it holds nothing but by chance.

    Args:
        message: of one worker and step, or the averages of all.
        model: with the weights from before the step, and in the same mode. It is not modified.
        inputs: samples that may have been in the batch, [samples, ...].
        labels: [samples].
        loss: of outputs and labels, a scalar.
        parameters: the model's, in the order of the optimizer; see `invert`.

    Returns:
        Scores, [samples], for `separation`.

    Raises:
        ValueError: the message is not of this model.

    Example:
        >>> from efsgd.audit import Message, Observed, update_scores
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> sent = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # of a sample [1, 0] of class 0
        >>> seen = Observed("weight", 0, sent.shape, "clear", (sent,), lambda j: (j,), sent)
        >>> update_scores(Message(0, 0, (seen,)), model, torch.eye(2), torch.tensor([0, 0])).round()
        tensor([1., 0.])
    """
    frozen = FrozenModel(model, loss, parameters)
    frozen.require_fits(message)
    scores = []
    for sample, label in zip(inputs.split(1), labels.split(1), strict=True):
        gradients = frozen.gradients(sample, label)
        own = [gradients[seen.index] for seen in message.parameters]
        product = sum(
            (gradient * seen.decompressed.to(gradient)).sum()
            for gradient, seen in zip(own, message.parameters, strict=True)
        )
        length = torch.stack([gradient.square().sum() for gradient in own]).sum().sqrt()
        scores.append(product / (length + torch.finfo(length.dtype).tiny))
    return torch.stack(scores)


def likelihood_ratios(target: Tensor, shadows: Tensor, is_member: Tensor) -> Tensor:
    """Of each sample how much likelier the target's score is of a model that trained on it: LiRA.

    An attacker who can train models like the target, on samples of the same kind with and without
    each one in question, knows how either kind scores it: some are easy and some are hard for all.
    Of each sample the scores of both kinds are taken for normal, with a mean of its own, and with
    a variance that all samples share, which takes fewer models.

    Args:
        target: scores of the model that is attacked, [samples]. They should be near to normal: the
            paper takes log(p / (1 - p)) of the probability p that the model gives to the label.
        shadows: the same of the attacker's models, [models, samples].
        is_member: whether a model was trained on a sample, bools [models, samples].

    Returns:
        Logarithms of ratios, float64 [samples], for `separation`.

    Raises:
        ValueError: shapes that do not belong together, or a sample with fewer than two models that
            were trained on it, or fewer than two that were not.

    Source: Carlini, Chien, Nasr, Song, Terzis and Tramèr, "Membership Inference Attacks From First
    Principles", IEEE S&P 2022, arXiv:2112.03570: online, with a global variance.

    Example:
        >>> from efsgd.audit import likelihood_ratios
        >>> is_member = torch.tensor([[True], [True], [False], [False]])
        >>> shadows = torch.tensor([[3.0], [5.0], [0.0], [2.0]])  # 4 with the sample, 1 without
        >>> likelihood_ratios(torch.tensor([4.0]), shadows, is_member)
        tensor([2.2500], dtype=torch.float64)
    """
    if shadows.shape != is_member.shape or shadows.shape[1:] != target.shape or target.ndim != 1:
        raise ValueError(
            f"Invalid scores: of shapes {list(target.shape)}, {list(shadows.shape)} and "
            f"{list(is_member.shape)}. They must be [samples], [models, samples] and again that."
        )
    logarithms = []
    for of_kind in (is_member, ~is_member):
        count = of_kind.sum(0)
        if len(count) and int(count.min()) < 2:
            raise ValueError(
                "Invalid is_member: each sample must be in the training data of two models at "
                "least, and missing in that of two. Train more models, each on half of the samples."
            )
        scores = shadows.double()
        mean = (scores * of_kind).sum(0) / count
        squares = ((scores - mean).square() * of_kind).sum(0)
        variance = squares.sum() / (count - 1).sum() + torch.finfo(torch.float64).tiny
        logarithms.append(-(target - mean).square() / (2 * variance) - variance.log() / 2)
    return logarithms[0] - logarithms[1]


def auc_under_noise(noise_multiplier: float) -> float:
    """The highest AUC of membership in one batch under differential privacy: Φ(1 / (√2 σ)).

    A record moves a sum of clipped gradients by at most one clipping norm, and the noise has σ
    times that. No score tells messages with a record from messages without it better than a normal
    variable is told from one that is shifted by 1 / σ, whatever is computed from the sum, as
    compression is. The bound is on the scores of records in independent messages, with and without
    them. Where one message has one of two records, which it is can be told up to Φ(1 / σ): their
    gradients may be opposite, two clipping norms apart.

    Args:
        noise_multiplier: σ, of whoever's sums the observer sees.

    Returns:
        From 0.5 to 1.

    Raises:
        ValueError: a negative number.

    Example:
        >>> from efsgd.audit import auc_under_noise
        >>> round(auc_under_noise(1.0), 3), round(auc_under_noise(4.0), 3), auc_under_noise(0.0)
        (0.76, 0.57, 1.0)
    """
    require_number("noise_multiplier", noise_multiplier)
    if noise_multiplier == 0:
        return 1.0
    return NormalDist().cdf(1 / (math.sqrt(2) * noise_multiplier))
