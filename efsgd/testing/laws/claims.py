"""Laws for compressors that claim more than others: contraction, and a mean without bias.

Where random numbers are involved these are statistical tests. A compressor that keeps its word
fails one of them with a probability below 1e-6 in all.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from efsgd.testing.gradients import gaussian, made_up
from efsgd.testing.simulation import Simulation
from efsgd.testing.trial import Trial, law
from efsgd.testing.violations import Violation

# Payloads may have numbers in float32 while tensors are float64.
ROUNDING = 1e-6

DRAWS = 150

# Of one test of a few dozen; ln 1e8.
NATS = 18.4

# One-sided: 1e-12 for a normal mean, 1e-7 for a mean of 150 squares of normal numbers.
STANDARD_ERRORS = 7.0

# At least and at most; in between, until the mean is known to within `WIDTH`.
MANY_DRAWS, WIDTH = (400, 1000), 0.03


@law("Claim less: the largest δ that is proven, or None where nothing is known.")
def contracts_as_claimed(trial: Trial) -> None:
    """What is not sent is as short as `claims().contraction` says.

    Its squared norm is at most (1 - δ) times that of what was compressed: always, for a compressor
    that draws no random numbers, and where δ is 0 for all shapes; else in the mean over draws,
    which is tested for gaussian tensors by its standard error, and for all others by a bound that
    holds for any distribution.
    """
    claims = trial.compressor.claims()
    if claims.contraction is None or not trial.compressed_shapes():
        return
    shapes, kinds = trial.compressed_shapes(), ["gaussian", "one_hot", "constant", "rank_deficient"]
    promised = {shape: claims.contraction(shape) for shape in shapes}
    for shape, claimed in promised.items():
        if not 0 <= claimed <= 1:
            raise Violation(f"for shape {list(shape)} it claims δ = {claimed!r}")
    in_the_mean = claims.is_random and any(promised.values())
    if in_the_mean:  # many draws of few
        shapes, kinds = [*shapes[len(shapes) // 2 : -1][:1], shapes[-1]], kinds[:3]
    for shape, kind in itertools.product(shapes, kinds):
        left = list(_left_out(trial, shape, kind, DRAWS if in_the_mean else trial.steps))
        claimed, worst, what = promised[shape], max(left), ""
        is_broken = worst > 1 - claimed + ROUNDING
        if in_the_mean:
            worst, what = sum(left) / DRAWS, f" in the mean over {DRAWS} draws"
            is_broken = _is_above(left, 1 - claimed, is_smooth=kind == "gaussian")
        if is_broken:
            raise Violation(
                f"of {kind} tensors of shape {list(shape)} it leaves out {worst:.6g} of the "
                f"squared norm{what}, and claims δ = {claimed:.6g}"
            )


def _left_out(trial: Trial, shape: torch.Size, kind: str, draws: int) -> Iterator[float]:
    """The part of the squared norm that is not sent, of one tensor after the other."""
    workers = trial.simulate(1, shapes=[shape], error_feedback=False)
    for draw in range(draws):
        delta = made_up(kind, shape, 0, trial.seed, draw)
        [sent] = _sent(workers, [delta])
        yield float((delta - sent).norm() / delta.norm()) ** 2


def _sent(workers: Simulation, deltas: Sequence[Tensor]) -> list[Tensor]:
    """What the next step makes of some tensors, with one worker and no errors."""
    for parameter in workers.parameters:
        parameter.zero_()
    workers.step([list(deltas)])
    return [-parameter for parameter in workers.parameters]  # x = -C(Δ)


def _is_above(sample: Sequence[float], limit: float, *, is_smooth: bool) -> bool:
    """Whether the expectation is surely above a limit from 0 to 1.

    By Chernoff's bound, and, for numbers that are spread, by the standard error of their mean.
    """
    limit = min(limit + ROUNDING, 1.0)
    values = torch.tensor(sample, dtype=torch.float64, device="cpu")
    clipped = float(values.clamp(max=1).mean())  # their expectation is not above it either
    if clipped > limit and len(sample) * _divergence(clipped, limit) > NATS:
        return True
    is_spread = is_smooth and len(set(sample)) > len(sample) // 2
    slack = STANDARD_ERRORS * float(values.std()) / math.sqrt(len(sample))
    return is_spread and float(values.mean()) > limit + slack


def _divergence(mean: float, limit: float) -> float:
    """Of two coins that show 1 with these probabilities, in nats."""
    pairs = [(mean, limit), (1 - mean, 1 - limit)]
    return sum(p * (math.log(p / q) if q > 0 else math.inf) for p, q in pairs if p > 0)


@law(
    "Do not claim to be without bias, or divide what is sent by the probability with which it is "
    "sent, and round up with the probability that the fraction says."
)
def is_unbiased_as_claimed(trial: Trial) -> None:
    """Where `claims().is_unbiased`, the mean of what is decompressed is what was compressed.

    Tested along the tensor itself, its signs, the direction of all ones, and two at random: over
    400 to 1000 draws the mean must be within 6 standard errors of what it is to be. A bias of a
    few percent of the tensor is found where a single draw is less wrong than the tensor is long.
    """
    if not trial.compressor.claims().is_unbiased:
        return
    shapes = trial.compressed_shapes()[-2:]
    if not shapes:
        return
    deltas = [gaussian(shape, trial.seed, index) for index, shape in enumerate(shapes)]
    probes = [_directions(delta, trial.seed) for delta in deltas]
    workers = trial.simulate(1, shapes=shapes, error_feedback=False)
    found: list[list[Tensor]] = [[] for _ in shapes]
    least, most = MANY_DRAWS
    for draw in range(most):
        for index, sent in enumerate(_sent(workers, deltas)):
            found[index].append(probes[index] @ (sent - deltas[index]).flatten())
        if draw + 1 >= least and (draw + 1) % 100 == 0:
            widest = max(float(_slack(torch.stack(own)).max()) for own in found)
            if widest < WIDTH:
                break
    for shape, own in zip(shapes, found, strict=True):
        values = torch.stack(own)  # [draws, directions], parts of the tensor's length
        mean = values.mean(0).abs()
        worst = int((mean - _slack(values)).argmax())
        if mean[worst] > _slack(values)[worst]:
            raise Violation(
                f"the mean of {len(own)} draws for a tensor of shape {list(shape)} differs from it "
                f"by {float(mean[worst]):.3g} of its length along {_DIRECTIONS[worst]}"
            )


_DIRECTIONS = ("itself", "its signs", "all ones", *["a random direction"] * 2)


def _directions(delta: Tensor, seed: int) -> Tensor:
    """Unit vectors, divided by the length of `delta`: [directions, delta.numel()]."""
    flat = delta.flatten()
    others = [gaussian(flat.shape, seed, 99, number) for number in range(2)]
    rows = torch.stack([flat, flat.sign(), torch.ones_like(flat), *others])
    lengths: Tensor = rows.norm(dim=1, keepdim=True) * flat.norm()
    return rows / lengths


def _slack(values: Tensor) -> Tensor:
    return 6 * values.std(0) / math.sqrt(len(values)) + ROUNDING
