"""How well the workers' mean matrices are approximated at each rank.

Only the mean's largest singular values are needed, and what is left beside them. They are found
without ever sending a whole matrix, by power iteration on a matrix that lies in parts on the
workers, as PowerSGD does it; or exactly, from the mean itself.

Source: Alimohammadi, Markov, Frantar, Alistarh: "L-GreCo: Layerwise-Adaptive Gradient Compression
for Efficient and Accurate Deep Learning", MLSys 2024, arXiv 2210.17357, whose errors these are;
Halko, Martinsson, Tropp: "Finding structure with randomness", SIAM Review 2011, arXiv 0909.4061
(power iteration on some random columns).

Legend::

    A        [n, m]   a worker's part of a matrix; what counts is the mean over the workers
    P_hat    [n, r]   orthonormal columns
    Q        [m, r]   A^T P_hat
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from efsgd.algorithms.low_rank.factors import initial_query
from efsgd.algorithms.powersgd import normalize_columns, orthogonalize
from efsgd.rank.approximation.sketch import mean_norms
from efsgd.wire.collectives import AllReduceMean, Exchange


def power_tails(
    matrices: Mapping[int, Tensor],
    ranks: Mapping[int, int],
    *,
    iterations: int = 2,
    sketch: int | None = 4096,
) -> Exchange[dict[int, Tensor]]:
    """What remains of each mean matrix at ranks 0 to r, by power iteration: [r + 1] float64.

    `matrices` are this worker's own, [n, m]; `ranks` has r of each, at most min(n, m). Each of the
    `iterations` sends r·(n + m) numbers of a matrix; of each remainder `sketch` numbers are sent
    (None: all). At k is the Frobenius norm of what a rank-k approximation leaves: without a sketch
    no less than the best one leaves, but for rounding. NaN or infinite where sums overflow.
    """
    Qs = {
        index: initial_query(0, index, A.shape[1], ranks[index]).to(A.device, A.dtype)
        for index, A in matrices.items()
    }
    P_hats, local = {}, Qs
    for _ in range(iterations):
        products = {index: A @ normalize_columns(Qs[index]) for index, A in matrices.items()}
        Ps = yield from _means(products, "P of accumulated gradients")
        P_hats = {index: orthogonalize(P) for index, P in Ps.items()}
        local = {index: A.mT @ P_hats[index] for index, A in matrices.items()}
        Qs = yield from _means(local, "Q of accumulated gradients")
    remainders = (A - P_hats[index] @ local[index].mT for index, A in matrices.items())
    norms = yield from mean_norms(remainders, sketch, seed=0)
    found = {}
    for (index, Q), norm in zip(Qs.items(), norms, strict=True):
        rest = 0.0 if ranks[index] == min(matrices[index].shape) else norm
        Q = Q.double().cpu()
        is_finite = bool(Q.isfinite().all())
        values = torch.linalg.svdvals(Q) if is_finite else Q.new_full((ranks[index],), torch.nan)
        found[index] = _tails(values, rest)
    return found


def exact_tails(
    means: Mapping[int, Tensor], ranks: Mapping[int, int], world_size: int, worker: int
) -> Exchange[dict[int, Tensor]]:
    """The same, from the mean matrices, which all workers have. Each does a part of the work.

    It is that of the best approximation, up to 1e-8 times the norm of the matrix.
    """
    found = {}
    for number, (index, A) in enumerate(means.items()):
        found[index] = torch.zeros(ranks[index] + 1, dtype=torch.float64, device=A.device)
        if number % world_size == worker:
            values = _by_gram_matrix(A.double())
            rest = float(torch.linalg.vector_norm(values[ranks[index] :]))
            found[index] = _tails(values[: ranks[index]], rest)
    mine = {index: world_size * tails for index, tails in found.items()}  # the others have zeros
    return (yield from _means(mine, "errors of accumulated gradients"))


def _by_gram_matrix(A: Tensor) -> Tensor:
    """The singular values, to 1e-8 of the largest; NaN, not an error, where A is not finite."""
    scale = A.abs().max()
    if not scale.isfinite():
        return A.new_full((min(A.shape),), torch.nan)
    A = A / scale.clamp_min(torch.finfo(A.dtype).tiny)
    gram = A @ A.mT if A.shape[0] <= A.shape[1] else A.mT @ A
    squares: Tensor = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)
    return scale * squares.sqrt()


def _tails(values: Tensor, rest: float) -> Tensor:
    """√(rest² + the sum of the squares of all values from the k-th on), for each k."""
    values = torch.cat([values, values.new_tensor([rest])])
    scale = values.max()  # NaN if one is
    squares = (values / scale.clamp_min(torch.finfo(values.dtype).tiny)).square()
    return scale * squares.flip(0).cumsum(0).flip(0).sqrt()


def _means(tensors: Mapping[int, Tensor], purpose: str) -> Exchange[dict[int, Tensor]]:
    """The means over the workers, by one collective."""
    first = next(iter(tensors.values()))
    dtype = max((t.dtype for t in tensors.values()), key=lambda dtype: dtype.itemsize)
    flat = [tensor.reshape(-1).to(first.device, dtype) for tensor in tensors.values()]
    mean = yield AllReduceMean(torch.cat(flat), purpose)
    parts = mean.split([math.prod(tensor.shape) for tensor in tensors.values()])
    return {
        index: part.view(tensor.shape).to(tensor.device, tensor.dtype)
        for (index, tensor), part in zip(tensors.items(), parts, strict=True)
    }
