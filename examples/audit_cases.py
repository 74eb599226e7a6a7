"""What is audited: images that come with packages, small models, and ways to send a gradient."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import skimage.data
import torch
from opacus import GradSampleModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from efsgd import LQSGD, ErrorFeedbackSGD, PowerSGD, SignNorm, TopK
from efsgd.audit import Attack, Report, report
from efsgd.compressors import Identity
from efsgd.privacy import PrivateOptimizer

COMPRESSORS = {
    "SGD": Identity(),
    "Rank 1": PowerSGD(1),
    "Rank 2": PowerSGD(2),
    "Rank 4": PowerSGD(4),
    "Rank 8": PowerSGD(8),
    "LQ-SGD, rank 1": LQSGD(1, bits=8),
    "Top-K 10 %": TopK(0.1),
    "Top-K 1 %": TopK(0.01),
    "Sign": SignNorm(),
}


@cache
def images(name: str) -> Tensor:
    """Gray images, float32 [100, 1, side, side] from 0 to 1."""
    if name == "faces":  # the first half of scikit-image's are faces, of 25×25 pixels
        faces = torch.tensor(skimage.data.lfw_subset()[:100], dtype=torch.float32)[:, None]
        return adaptive_avg_pool2d(faces, 16)
    digits = torch.tensor(load_digits().images[:100], dtype=torch.float32)
    return digits[:, None] / 16


def mlp(size: int) -> nn.Module:
    """A linear first layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(size * size, 64), nn.Sigmoid(), nn.Linear(64, 10))


def convolutions(size: int) -> nn.Module:
    """Two convolutions, with first values from -0.5 to 0.5, as in the attacks' papers."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, 2, 2), nn.Sigmoid(), nn.Conv2d(8, 16, 5, 2, 2), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(size * size, 10),
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


MODELS: Mapping[str, Callable[[int], nn.Module]] = {"MLP": mlp, "convolutions": convolutions}


@dataclass(frozen=True)
class Case:
    """One audit.

    Attributes:
        data: "faces" or "digits".
        model: of `MODELS`.
        batch_size: how many images a message is of.
        method: of `COMPRESSORS`.
        number: which images; also the seed of the model and of the attacks.
        noise_multiplier: σ of differential privacy, with a clipping norm of 1; None: none.
        steps: with the same images and weights.
        workers: in each step, each with as many images of its own.
        iterations: of each start of an attack.
        restarts: of each attack.
    """

    data: str
    model: str
    batch_size: int
    method: str
    number: int = 0
    noise_multiplier: float | None = None
    steps: int = 1
    workers: int = 1
    iterations: int = 120
    restarts: int = 1

    @property
    def attacks(self) -> dict[str, Attack]:
        """Naive and adaptive, with little and with much preference for smooth images.

        Where everything is sent both are the same. A gradient that was clipped has a length that
        says nothing, so that only its direction is compared.
        """
        found = {}
        is_plain = self.method == "SGD" and self.steps == 1
        for kind, adaptive in (("adaptive", True),) if is_plain else (
            ("naive", False), ("adaptive", True)
        ):  # fmt: skip
            for name, smooth in ((kind, 1e-4), (f"{kind}, smooth", 1e-2)):
                found[name] = Attack(
                    adaptive=adaptive, iterations=self.iterations, restarts=self.restarts,
                    total_variation=smooth,
                    distance="l2" if self.noise_multiplier is None else "cosine",
                )  # fmt: skip
        return found


def audit(case: Case) -> Report:
    """Takes the steps of a case with the package's own optimizer, and attacks what was sent."""
    torch.set_num_threads(1)
    pixels, size = images(case.data), case.batch_size
    labels = torch.arange(len(pixels)) % 10
    first = case.number * case.workers * size
    starts = range(first, first + case.workers * size, size)
    batch, *peers = ((pixels[n : n + size], labels[n : n + size]) for n in starts)
    compressor: Any = COMPRESSORS[case.method]
    if isinstance(compressor, PowerSGD | LQSGD):
        compressor = replace(compressor, seed=case.number)

    def optimizer(model: nn.Module) -> Any:
        found = ErrorFeedbackSGD(
            model.parameters(), lr=0.1, momentum_form="sgd", compressor=compressor
        )
        if case.noise_multiplier is None:
            return found
        return PrivateOptimizer(
            found, noise_multiplier=case.noise_multiplier, max_grad_norm=1.0,
            expected_batch_size=case.workers * size, sample_rate=0.01,
            generator=torch.Generator().manual_seed(case.number),
        )  # fmt: skip

    def model() -> nn.Module:
        plain = MODELS[case.model](pixels.shape[-1])
        return plain if case.noise_multiplier is None else GradSampleModule(plain)

    return report(
        model, optimizer, batch, peers=peers, others=(pixels[50:], labels[50:]),
        attacks=case.attacks, steps=case.steps, seed=case.number, seconds=math.inf,
    )  # fmt: skip
