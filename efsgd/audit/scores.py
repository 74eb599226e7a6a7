"""How close an attack came: images beside images, labels, and who was a member."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

_SIGMA, _RADIUS = 1.5, 5  # a Gaussian window of 11×11 pixels
_K1, _K2 = 0.01, 0.03
#: No difference that float32 can hold of values near 1 gives more.
_MOST_DECIBELS = 120.0


def ssim(originals: Tensor, others: Tensor, *, data_range: float = 1.0) -> Tensor:
    """The structural similarity of images, one by one: 1 for equal ones, about 0 for unrelated.

    As Wang et al. (2004) define it: a Gaussian window of 11×11 pixels with σ = 1.5, K₁ = 0.01, K₂ =
    0.03, the mean over all places where the window fits, and over channels. Pixels of images that
    are smaller than the window are repeated, in both directions, until it fits.

    Args:
        originals: floats [images, channels, height, width].
        others: of the same shape.
        data_range: the largest value that a pixel may have less the smallest.

    Returns:
        Float64 [images].

    Raises:
        ValueError: no images, or shapes that differ.

    Example:
        >>> from efsgd.audit import ssim
        >>> image = torch.rand(1, 1, 16, 16)
        >>> ssim(image, image).item(), ssim(image, 1 - image).item() < 0
        (1.0, True)
    """
    _require_alike(originals, others)
    if originals.ndim != 4:
        raise ValueError(
            f"Invalid originals: of shape {list(originals.shape)}. Must be images, [images, "
            "channels, height, width]. Compare what are no images with `psnr`."
        )
    window_size = 2 * _RADIUS + 1
    times = math.ceil(window_size / max(min(originals.shape[2:]), 1))
    x, y = (
        each.double().repeat_interleave(times, 2).repeat_interleave(times, 3).flatten(0, 1)[:, None]
        for each in (originals, others)
    )
    places = torch.arange(-_RADIUS, _RADIUS + 1, dtype=x.dtype, device=x.device)
    window = torch.exp(-places.square() / (2 * _SIGMA**2))
    window = window / window.sum()

    def mean(image: Tensor) -> Tensor:
        return conv2d(conv2d(image, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_x, mean_y = mean(x), mean(y)
    variances = mean(x * x) - mean_x.square() + mean(y * y) - mean_y.square()
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return (luminance * structure).flatten(1).mean(1).view(originals.shape[:2]).mean(1)


def psnr(originals: Tensor, others: Tensor, *, data_range: float = 1.0) -> Tensor:
    """The peak signal-to-noise ratio of samples, one by one, at most 120 dB.

    Args:
        originals: floats [samples, ...].
        others: of the same shape.
        data_range: the largest value less the smallest.

    Returns:
        Float64 [samples], decibels.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> from efsgd.audit import psnr
        >>> psnr(torch.zeros(1, 4), torch.full((1, 4), 0.1)).round().item()
        20.0
    """
    _require_alike(originals, others)
    error = (originals.double() - others.double()).square().flatten(1).mean(1)
    least = data_range**2 * 10 ** (-_MOST_DECIBELS / 10)
    return 10 * torch.log10(data_range**2 / error.clamp(min=least))


def best_match(originals: Tensor, others: Tensor) -> Tensor:
    """Which of the others belongs to each original: the pairs with the least squared error in all.

    A gradient does not say in which order a batch was, so neither does its reconstruction.

    Args:
        originals: floats [samples, ...].
        others: of the same shape.

    Returns:
        Int64 [samples], a permutation: `others[best_match(originals, others)]` is in the order of
        the originals.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> from efsgd.audit import best_match
        >>> best_match(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[3.1], [0.9], [2.0]]))
        tensor([1, 2, 0])
    """
    _require_alike(originals, others)
    x, y = originals.double().flatten(1), others.double().flatten(1)
    costs = (x[:, None] - y[None]).square().sum(2)
    return torch.tensor(_assignment(costs.tolist()), dtype=torch.int64)


def _assignment(costs: list[list[float]]) -> list[int]:
    """For each row its column in a cheapest assignment.

    The Hungarian method with shortest augmenting paths: rows enter one by one, and prices of rows
    and columns keep every reduced cost at or above zero.
    """
    n = len(costs)
    row_prices, column_prices = [0.0] * n, [0.0] * (n + 1)
    row_of = [-1] * (n + 1)  # of each column; column n stands for where a new row begins
    for new in range(n):
        row_of[n] = new
        distances, previous, is_done = [math.inf] * n, [n] * n, [False] * (n + 1)
        column = n
        while row_of[column] >= 0:
            is_done[column], row = True, row_of[column]
            for other in (c for c in range(n) if not is_done[c]):
                reduced = costs[row][other] - row_prices[row] - column_prices[other]
                if reduced < distances[other]:
                    distances[other], previous[other] = reduced, column
            nearest = min((c for c in range(n) if not is_done[c]), key=distances.__getitem__)
            step = distances[nearest]
            for other in range(n + 1):
                if is_done[other]:
                    row_prices[row_of[other]] += step
                    column_prices[other] -= step
                elif other < n:
                    distances[other] -= step
            column = nearest
        while column != n:
            row_of[column], column = row_of[previous[column]], previous[column]
        row_of[n] = -1
    found = [0] * n
    for column in range(n):
        found[row_of[column]] = column
    return found


def label_recovery(true: Tensor, found: Tensor) -> float:
    """The part of a batch's labels that was found, in whatever order.

    Args:
        true: integers [samples].
        found: integers [samples].

    Returns:
        From 0 to 1.

    Example:
        >>> from efsgd.audit import label_recovery
        >>> label_recovery(torch.tensor([3, 3, 5, 0]), torch.tensor([5, 3, 1, 1]))
        0.5
    """
    _require_alike(true, found)
    classes = torch.cat([true, found]).unique()
    counts = [(labels[:, None] == classes).sum(0) for labels in (true, found)]
    return torch.minimum(*counts).sum().item() / max(len(true), 1)


@dataclass(frozen=True)
class Separation:
    """How well scores tell members from others.

    Attributes:
        auc: the probability that a member's score is above another's, with ties as one half: 0.5
            for guessing.
        auc_interval: 95 % of bootstrap samples lie in it.
        tpr: the part of the members above the threshold that a part `fpr` of the others exceeds.
        tpr_interval: 95 % of bootstrap samples lie in it.
        fpr: that part.
        members: how many scores there are of members.
        others: and of others. With fewer than 10 / fpr the TPR is an indication only.
    """

    auc: float
    auc_interval: tuple[float, float]
    tpr: float
    tpr_interval: tuple[float, float]
    fpr: float
    members: int
    others: int


def separation(
    members: Tensor,
    others: Tensor,
    *,
    fpr: float = 0.01,
    seed: int = 0,
    resamples: int = 1000,
) -> Separation:
    """AUC, and TPR at a low FPR, of scores that are higher where membership is more likely.

    Args:
        members: scores of those that were members, floats [members].
        others: scores of those that were not, floats [others].
        fpr: the part of the others that may be taken for members.
        seed: of the bootstrap, which draws both sets anew.
        resamples: how often.

    Returns:
        Both, with intervals.

    Raises:
        ValueError: no scores, or NaN among them.

    Example:
        >>> from efsgd.audit import separation
        >>> found = separation(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]), fpr=0.5)
        >>> found.auc, found.tpr
        (0.75, 1.0)
    """
    x, y = members.detach().double().flatten().cpu(), others.detach().double().flatten().cpu()
    if not len(x) or not len(y) or bool(torch.cat([x, y]).isnan().any()):
        raise ValueError(
            f"Invalid scores: {len(x)} of members and {len(y)} of others. There must be some of "
            "both, none of them NaN. Look for a loss that overflowed."
        )
    generator = torch.Generator().manual_seed(seed)
    draws = [
        torch.randint(len(each), (resamples, len(each)), generator=generator) for each in (x, y)
    ]
    auc, tpr = _auc_and_tpr(x[None], y[None], fpr)
    aucs, tprs = _auc_and_tpr(x[draws[0]], y[draws[1]], fpr)
    return Separation(
        float(auc), _middle(aucs), float(tpr), _middle(tprs), fpr, members=len(x), others=len(y)
    )


def _auc_and_tpr(members: Tensor, others: Tensor, fpr: float) -> tuple[Tensor, Tensor]:
    """Of each row."""
    members, ordered = members.contiguous(), others.sort(1).values
    below = torch.searchsorted(ordered, members)
    not_above = torch.searchsorted(ordered, members, right=True)
    auc = (below + not_above).double().mean(1) / (2 * others.shape[1])
    allowed = math.floor(fpr * others.shape[1])
    if allowed >= others.shape[1]:
        return auc, torch.ones_like(auc)
    threshold = ordered[:, -1 - allowed, None]
    return auc, (members > threshold).double().mean(1)


def _middle(values: Tensor) -> tuple[float, float]:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _require_alike(originals: Tensor, others: Tensor) -> None:
    if originals.shape != others.shape:
        raise ValueError(
            f"Invalid shapes: {list(originals.shape)} and {list(others.shape)}. They must be "
            "equal. Compare a batch with a reconstruction of all of it."
        )
