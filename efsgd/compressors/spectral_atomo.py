"""A few singular triples, drawn at random so that their mean is the whole."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from efsgd.algorithms.interfaces import Claims
from efsgd.algorithms.operators import Payload
from efsgd.algorithms.reading import Reading
from efsgd.checks import require_choice, require_integer
from efsgd.compressors.numerics import power_of_two
from efsgd.compressors.tensor_compressor import TensorCompressor
from efsgd.layout import is_fake, matrix_shape
from efsgd.randomness import Draws
from efsgd.wire.payload import Field


def inclusion_probabilities(values: Tensor, count: int) -> Tensor:
    """The probabilities min(1, c·σ) that sum to `count`: those of least variance (water-filling).

    The σ are [k] float64, at least 0, in descending order. Where less than `count` of them are
    above 0, the first `count` are sure. Source: ATOMO, Algorithm 1.

    Example:
        >>> from efsgd.compressors.spectral_atomo import inclusion_probabilities
        >>> inclusion_probabilities(torch.tensor([6.0, 2.0, 1.0, 1.0]), 2).tolist()
        [1.0, 0.5, 0.25, 0.25]
    """
    rests = values.flip(0).cumsum(0).flip(0)  # each value with all that follow
    places = count - torch.arange(len(values), device=values.device)
    is_sure = (places > 0) & (places * values >= rests)
    sure = int(is_sure.long().cumprod(0).sum())
    probabilities = torch.zeros_like(values)
    probabilities[:sure] = 1.0
    if sure < count:
        probabilities[sure:] = (count - sure) * values[sure:] / rests[sure]
    return probabilities


def systematic_sample(probabilities: Tensor, count: int, draw: float) -> Tensor:
    """A sample of exactly `count`, each with its own probability of being in it.

    The probabilities, [k] float64 in descending order, are laid end to end, from 0 to `count`. Of a
    comb whose teeth are one apart, and which is shifted by `draw`, uniform in [0, 1), each tooth
    picks the one on which it stands. Positions are [count] int64 in ascending order.
    """
    whole = torch.arange(count, dtype=probabilities.dtype, device=probabilities.device)
    teeth = torch.minimum(whole + draw, torch.nextafter(whole + 1, whole))  # 1 stays excluded
    found = torch.searchsorted(probabilities.cumsum(0), teeth, right=True)
    # Rounding may leave the last tooth beyond the end.
    return found.clamp_(max=int(probabilities.count_nonzero()) - 1)


def draw_until(
    probabilities: Tensor, count: int, generator: torch.Generator, tries: int
) -> Tensor | None:
    """Draws each on its own, again and again until exactly `count` are drawn: [count] int64.

    Positions are in ascending order. After so many tries, and where fewer than `count` of the
    probabilities, [k] float64 on the CPU, are above 0, there are none.
    """
    if count > int(probabilities.count_nonzero()):
        return None
    for _ in range(tries):
        drawn = torch.rand(
            probabilities.shape, dtype=torch.float64, generator=generator, device="cpu"
        )
        kept = (drawn < probabilities).nonzero().view(-1)
        if len(kept) == count:
            return kept
    return None


_TRIES = 1000


def atomo_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The matrix [n, m] as which a tensor is seen: the first two dimensions by all the others.

    With half of the first two dimensions as rows it is the shape of the code that came with the
    PowerSGD paper. A vector becomes two columns; a matrix stays as it is, and so does one with
    further dimensions of size 1. What cannot be halved is the first dimension by all the others.

    Example:
        >>> from efsgd.compressors.spectral_atomo import atomo_shape
        >>> atomo_shape((64, 32, 3, 3)), atomo_shape((64, 32, 1, 1)), atomo_shape((64,))
        ((1024, 18), (64, 32), (32, 2))
        >>> atomo_shape((5, 3, 3, 3)), atomo_shape((7,)), atomo_shape(())
        ((5, 27), (7, 1), (1, 1))
    """
    is_matrix = len(shape) > 1 and math.prod(shape[2:]) == 1
    outer = math.prod(shape[:2])
    if is_matrix or outer % 2:
        return matrix_shape(shape)
    return outer // 2, 2 * math.prod(shape[2:])


@dataclass(frozen=True)
class SpectralAtomo(TensorCompressor):
    """Spectral ATOMO: sends some singular triples, of fixed number, chosen at random.

    A tensor is seen as the matrix [n, m] of `atomo_shape`. Of its singular value decomposition
    Σ σᵢ·uᵢ·vᵢᵀ, s = min(n, m, rank) atoms are sent, with σᵢ divided by the probability pᵢ that
    atom i is: s·(n + m + 1) numbers, for vectors and small matrices more than there are. Payloads
    are gathered. Each step decomposes every tensor, which takes long for large matrices.

    With `sampling="atomo"`, pᵢ = min(1, c·σᵢ) with a sum of s, and the mean over random numbers is
    the matrix. ATOMO draws each atom on its own, so that their number varies. Here it is fixed
    (systematic sampling), with the same probabilities; and since atoms are orthogonal, with the
    same second moment Σ σᵢ² / pᵢ.

    With `sampling="rejection"`, as in the code that came with the PowerSGD paper, pᵢ =
    min(1, s·σᵢ / Σσ) and each atom is drawn on its own, again and again until there are s. This
    makes the probabilities others than those that are divided by: it is biased. If none of 1000
    tries gives s atoms, or there are fewer, the s largest are sent as they are.

    Use it with `error_feedback=False`, as the PowerSGD paper did. What is not sent may be longer
    than what was compressed; fed back as an error it may grow without bound.

    Source: Wang, Sievert, Charles, Liu, Wright, Papailiopoulos: "ATOMO", NeurIPS 2018, arXiv
    1806.04090; "Spectral Atomo" in the appendix of PowerSGD (arXiv 1905.13727).

    Attributes:
        rank: s, at least 1. May be set per parameter group.
        sampling: "atomo" or "rejection". May be set per parameter group.
        seed: of each worker's own random numbers.
        batch_dims: how many of a tensor's first dimensions count tensors, each of which is
            compressed as a parameter by itself would be. May be set per parameter group.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from efsgd import ErrorFeedbackSGD, SpectralAtomo
        >>> model, compressor = torch.nn.Linear(64, 32), SpectralAtomo(rank=2)
        >>> optimizer = ErrorFeedbackSGD(
        ...     model.parameters(),
        ...     lr=0.1,
        ...     momentum_form="sgd",
        ...     compressor=compressor,
        ...     error_feedback=False,
        ... )
        >>> compressor.payload_bytes([(32, 64), (32,)])  # 2·(32 + 64 + 1) + 2·(16 + 2 + 1) floats
        928
    """

    rank: int = 2
    sampling: str = "atomo"
    seed: int = 0
    batch_dims: int = 0

    def __post_init__(self) -> None:
        triples = "It is the number of singular triples that are sent."
        require_integer("rank", self.rank, 1, remedy=triples)
        unbiased = "'atomo' is unbiased."
        require_choice("sampling", self.sampling, ("atomo", "rejection"), remedy=unbiased)
        require_integer("seed", self.seed, 0)
        one_each = "0 makes every tensor one matrix, 1 makes experts [E, n, m] E of them."
        require_integer("batch_dims", self.batch_dims, 0, remedy=one_each)

    def fields(self, shape: torch.Size) -> Sequence[Field]:
        """The u of all atoms, one after the other; their σ / p; their v."""
        n, m = atomo_shape(shape)
        count = min(n, m, self.rank)
        return Field(count * n), Field(count), Field(count * m)

    def compress(self, delta: Tensor, draws: Draws) -> Payload:
        matrix = delta.view(atomo_shape(delta.shape))
        scale = power_of_two(*torch.aminmax(matrix))
        left, values, right = torch.linalg.svd(matrix / scale, full_matrices=False)
        chosen, weights = self._sample(values.to("cpu", torch.float64), draws.private())
        chosen, weights = chosen.to(delta.device), weights.to(delta.device, delta.dtype)
        return left.mT[chosen].view(-1), weights * scale, right[chosen].view(-1)

    def decompress(self, payload: Payload, shape: torch.Size, draws: Draws) -> Tensor:
        left, right = self._factors(payload)
        return (left.mT @ right).view(shape)

    def add_decompressed_(self, out: Tensor, payload: Payload, draws: Draws, alpha: float) -> None:
        left, right = self._factors(payload)
        out.view(left.shape[1], right.shape[1]).addmm_(left.mT, right, alpha=alpha)

    def read(self, payload: Payload, decompressed: Tensor, draws: Draws) -> Reading:
        """Directions: M v is a multiple of u, and M^T u of v. The weight is σ / p, and p unknown.

        Where σ is small rounding spoils them, so each is multiplied by its weight.
        """
        left, weights, right = payload
        count = len(weights)
        u, v = left.view(count, -1).mT, right.view(count, -1).mT

        def measure(candidate: Tensor) -> tuple[Tensor, ...]:
            dtype = torch.promote_types(candidate.dtype, u.dtype)
            M = candidate.to(dtype).reshape(len(u), len(v))
            products = M @ v.to(dtype), M.mT @ u.to(dtype)
            lengths = [torch.linalg.vector_norm(product, dim=0) for product in products]
            safe = [torch.where(length > 0, length, 1.0) for length in lengths]
            return products[0] * (weights / safe[0]), products[1] * (weights / safe[1])

        return Reading("triplets", (u * weights, v * weights), measure, decompressed)

    def claims(self) -> Claims:
        """Random; unbiased with ATOMO's own sampling."""
        return Claims(self.averages, is_random=True, is_unbiased=self.sampling == "atomo")

    def _factors(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """The u, multiplied by what belongs to them, and the v: [s, n], [s, m]."""
        left, weights, right = payload
        count = len(weights)
        return left.view(count, -1) * weights.unsqueeze(-1), right.view(count, -1)

    def _sample(self, values: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Which atoms are sent, and their σ / p."""
        count = min(len(values), self.rank)
        if is_fake(values):  # which are sent makes no difference
            return torch.arange(count, device=values.device), values[:count]
        if self.sampling == "atomo":
            probabilities = inclusion_probabilities(values, count)
            draw = torch.rand((), dtype=torch.float64, generator=generator, device="cpu")
            chosen = systematic_sample(probabilities, count, float(draw))
            return chosen, values[chosen] / probabilities[chosen]
        total = values.sum()
        probabilities = (count * values / torch.where(total > 0, total, 1.0)).clamp(max=1.0)
        drawn = draw_until(probabilities, count, generator, _TRIES)
        if drawn is None:
            return torch.arange(count, device=values.device), values[:count]
        return drawn, values[drawn] / probabilities[drawn]
