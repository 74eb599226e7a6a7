"""The best choice of one candidate per layer: by trying all, and by the textbook's programme."""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from random import Random

from efsgd.rank.allocation import Candidate

Table = Sequence[Sequence[Candidate]]


def chosen(table: Table, choice: Sequence[int]) -> list[Candidate]:
    return [layer[index] for layer, index in zip(table, choice, strict=True)]


def total_error(table: Table, choice: Sequence[int]) -> float:
    return math.fsum(candidate.error for candidate in chosen(table, choice))


def total_size(table: Table, choice: Sequence[int]) -> float:
    return math.fsum(candidate.size for candidate in chosen(table, choice))


def exact_totals(table: Table, choice: Sequence[int]) -> tuple[Fraction, Fraction]:
    """Size and error, without rounding."""
    candidates = chosen(table, choice)
    size = sum((Fraction(candidate.size) for candidate in candidates), Fraction(0))
    return size, sum((Fraction(candidate.error) for candidate in candidates), Fraction(0))


def best_of_all(table: Table, budget: float) -> list[int]:
    """Least size, then least error, then the first of those that itertools.product gives."""
    choices = itertools.product(*(range(len(layer)) for layer in table))
    within = [choice for choice in choices if total_error(table, choice) <= budget]
    least = min(total_size(table, choice) for choice in within)
    # Rounding keeps the order, so that the least is among them; exact sums then tell which it is.
    close = [choice for choice in within if total_size(table, choice) == least]
    return list(min(close, key=lambda choice: (*exact_totals(table, choice), choice)))


def textbook(table: Table, budget: float) -> float:
    """Least size, for errors that are integers: the least size of every total error in turn."""
    sizes = {0.0: 0.0}
    for layer in table:
        longer: dict[float, float] = {}
        for spent, size in sizes.items():
            for candidate in layer:
                error = spent + candidate.error
                if error <= budget:
                    longer[error] = min(longer.get(error, math.inf), size + candidate.size)
        sizes = longer
    return min(sizes.values())


def random_table(random: Random, layers: int, candidates: int) -> list[list[Candidate]]:
    """Layers of one kind: unrelated numbers, small integers, or a line that is almost straight."""
    kind = random.choice(["unrelated", "integers", "line"])
    return [[_made(random, kind) for _ in range(candidates)] for _ in range(layers)]


def _made(random: Random, kind: str) -> Candidate:
    if kind == "integers":
        return Candidate(random.randint(0, 9), random.randint(0, 9))
    size = random.random()
    if kind == "line":
        return Candidate(size, 1.01 - size + random.uniform(-0.01, 0.01))
    return Candidate(size * 10 ** random.uniform(0, 3), random.random())
