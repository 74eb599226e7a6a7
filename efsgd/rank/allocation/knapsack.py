"""The multiple-choice knapsack problem, solved in integers: no total is ever rounded.

Of every layer one item is chosen, such that the total size is least and the total error within a
limit. A dynamic programme over the layers keeps those partial choices that no other beats in both
error and size, and that may still lead to less size than the best choice known (Pisinger: "A
minimal algorithm for the multiple-choice knapsack problem", European Journal of Operational
Research 83(2), 1995).
"""

from collections.abc import Sequence
from typing import NamedTuple

from efsgd.rank.allocation.relaxation import (
    Layer,
    State,
    greedy,
    reachable,
    steps_of,
    total,
    undominated,
    viable,
    without_hopeless,
)

#: How many partial choices are kept: few at first, since the choice they lead to shows how many
#: others are pruned, and more where that was not enough.
FRONTIERS = (32, 256, 512)


class Solution(NamedTuple):
    """A choice, and what is known of it.

    Attributes:
        choice: which item of each layer.
        is_optimal: whether it is known that no choice has less size, or the same and less error.
    """

    choice: list[int]
    is_optimal: bool


def solve(
    layers: Sequence[Sequence[tuple[int, int]]], limit: int, known: Sequence[int] | None = None
) -> Solution:
    """Chooses an item of every layer: least size, then least error, then lowest indices.

    Args:
        layers: the (error, size) of every item, none negative.
        limit: of the total error, at least the sum of the layers' least errors.
        known: a choice within the limit; the result is no worse.

    Returns:
        The choice. Where partial choices had to be left out it may not be optimal, and where it is,
        another one of the same totals may have lower indices.

    Example:
        >>> from efsgd.rank.allocation.knapsack import solve
        >>> solve([[(4, 1), (1, 2)], [(4, 10), (1, 20)]], limit=5)
        Solution(choice=[1, 0], is_optimal=True)
    """
    digits = max(len(layer) for layer in layers).bit_length()
    places = [digits * place for place in reversed(range(len(layers)))]
    coded = [
        [State(error, size, item << place) for item, (error, size) in enumerate(layer)]
        for layer, place in zip(layers, places, strict=True)
    ]
    candidates = [undominated(sorted(layer)) for layer in coded]
    best, beyond = greedy(candidates, limit)
    if known is not None:
        chosen = total(layer[item] for layer, item in zip(coded, known, strict=True))
        best = min(best, chosen, key=_preference)
    is_optimal = False
    for most in FRONTIERS:
        kept, room = without_hopeless(candidates, limit, best, beyond)
        # A sweep that left some out may have met the bound all the same.
        is_optimal = room == 0 and most != FRONTIERS[0]
        if not is_optimal:
            best, is_optimal = _sweep(kept, limit, best, most)
        if is_optimal:
            break
    mask = (1 << digits) - 1
    return Solution([best.code >> place & mask for place in places], is_optimal)


def _preference(state: tuple[int, int, int]) -> tuple[int, int, int]:
    error, size, code = state
    return size, error, code


def _sweep(layers: Sequence[Layer], limit: int, best: State, most: int) -> tuple[State, bool]:
    """The best choice found with at most so many partial ones; whether none was left out."""
    free = [layer for layer in layers if len(layer) > 1]
    # The widest range of errors first: the last layers can then make up for little.
    free.sort(key=lambda layer: layer[0].error - layer[-1].error)
    fixed = total([State(0, 0, 0), *(layer[0] for layer in layers if len(layer) == 1)])
    steps = steps_of(free)
    states: list[tuple[int, int, int]] = [fixed]
    is_complete = True
    for index, layer in enumerate(free):
        sums = sorted((e + a, s + b, c + d) for e, s, c in layer for a, b, d in states)
        corners = reachable(free[index + 1 :], (step for step in steps if step.layer > index))
        ranked = list(viable(undominated(sums), corners, limit, best.size))
        if len(ranked) > most:
            is_complete = False
            ranked = sorted(ranked)[:most]
        states = [state for _, state in ranked]
    return State(*min([best, *states], key=_preference)), is_complete
