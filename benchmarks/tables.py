"""Tables of candidates as a network's layers would give them, without a network."""

import math
from itertools import accumulate
from random import Random

from efsgd.rank.allocation import Candidate

# Singular values that are looked at; those after them are taken to be zero.
MOST = 512


def made_table(layers: int, candidates: int, seed: int) -> list[list[Candidate]]:
    """Candidates of rank 1, 2, ... for matrices whose singular values decay.

    The sides of the matrices lie between 16 and 8192, so sizes differ by three orders of
    magnitude. Singular values decay as a power, from fast to slowly.

    Args:
        layers: how many.
        candidates: how many ranks, for each layer.
        seed: of all that is drawn.

    Returns:
        For each layer: of rank r the numbers sent, min(r, n, m)·(n + m), and the error, which is
        the Frobenius norm of what is beyond the r largest singular values.
    """
    random = Random(seed)
    return [_layer(candidates, random) for _ in range(layers)]


def _layer(candidates: int, random: Random) -> list[Candidate]:
    n, m = (round(2 ** random.uniform(4, 13)) for _ in range(2))
    decay = random.uniform(0.3, 1.5)
    norm = 10 ** random.uniform(-2, 0)
    values = [norm * i**-decay * random.uniform(0.8, 1.2) for i in range(1, min(n, m, MOST) + 1)]
    squares = sorted(value**2 for value in values)
    tails = [math.sqrt(tail) for tail in accumulate(squares, initial=0.0)]  # ascending
    return [
        Candidate(size=rank * (n + m), error=tails[-1 - rank])
        for rank in (min(wanted, n, m) for wanted in range(1, candidates + 1))
    ]
