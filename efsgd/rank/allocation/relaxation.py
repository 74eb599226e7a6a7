"""What choices of one item per layer can reach at most: the bounds of the knapsack problem.

In the linear relaxation a layer may lie between two items. It is solved by taking steps along the
layers' convex hulls, those first that save most size for their error (Sinha and Zoltners: "The
multiple-choice knapsack problem", Operations Research 27(3), 1979).
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import cmp_to_key
from itertools import pairwise
from typing import NamedTuple, TypeVar

# Binary places of the bounds by which states are ordered.
PLACES = 16


class State(NamedTuple):
    """Totals of items, one of each of some layers; also a single item.

    Attributes:
        error: their total error.
        size: their total size.
        code: which items they are: a number whose digits are the items.
    """

    error: int
    size: int
    code: int


class Step(NamedTuple):
    """From an item of a layer to the next smaller one on the convex hull.

    Attributes:
        error: how much the error grows.
        saved: how much the size shrinks.
        layer: index of the layer.
        item: where the step ends.
    """

    error: int
    saved: int
    layer: int
    item: State


#: The items of a layer. Undominated ones are in ascending order of their errors.
Layer = list[State]


# Of the many states of a search, which a plain tuple holds faster.
_T = TypeVar("_T", bound=tuple[int, int, int])


def total(states: Iterable[State]) -> State:
    """The sums of errors, sizes and codes."""
    return State(*map(sum, zip(*states, strict=True)))


def undominated(ascending: Iterable[_T]) -> list[_T]:
    """Those with less size than all before them, none of which has more error."""
    kept: list[_T] = []
    for state in ascending:
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept


def steps_of(layers: Sequence[Layer]) -> list[Step]:
    """All steps along the layers' hulls; first those that save most size for their error."""
    steps = []
    for index, layer in enumerate(layers):
        for a, b in pairwise(_hull(layer)):
            steps.append(Step(b.error - a.error, a.size - b.size, index, b))
    return sorted(steps, key=cmp_to_key(_by_price))


def _by_price(a: Step, b: Step) -> int:
    return b.saved * a.error - a.saved * b.error


def _hull(layer: Layer) -> Layer:
    """The corners of the lower convex hull of undominated items."""
    corners: Layer = []
    for c in layer:
        while len(corners) > 1:
            a, b = corners[-2:]
            # Whether b is below the line from a to c.
            if (a.size - b.size) * (c.error - a.error) > (a.size - c.size) * (b.error - a.error):
                break
            corners.pop()
        corners.append(c)
    return corners


def greedy(layers: Sequence[Layer], limit: int) -> tuple[State, Step | None]:
    """A choice within the limit, and the first step that was beyond it.

    Args:
        layers: undominated items.
        limit: of the total error, at least the sum of the layers' least.
    """
    chosen = [layer[0] for layer in layers]
    error = sum(item.error for item in chosen)
    beyond: Step | None = None
    stopped: set[int] = set()
    for step in steps_of(layers):
        if step.layer in stopped:
            continue
        if error + step.error <= limit:
            error += step.error
            chosen[step.layer] = step.item
        else:
            beyond = beyond or step
            stopped.add(step.layer)
    return total(chosen), beyond


def without_hopeless(
    layers: Sequence[Layer], limit: int, best: State, beyond: Step | None
) -> tuple[list[Layer], int]:
    """Leaves out items that only larger choices than the best have, by the Lagrangian bound.

    Where error is paid for at the step's price, every choice within the limit costs at least the
    sum of the layers' least costs.

    Args:
        layers: undominated items.
        limit: of the total error.
        best: a choice within the limit.
        beyond: a step whose price is used; None where the limit does not bind.

    Returns:
        The remaining items, and how far the best choice is above the bound. Where that is 0,
        no choice within the limit has less size, or the same and less error.
    """
    saved, error = (beyond.saved, beyond.error) if beyond else (0, 1)
    costs = [[error * item.size + saved * item.error for item in layer] for layer in layers]
    least = [min(row) for row in costs]
    room = error * best.size + saved * limit - sum(least)
    kept = [
        [item for item, cost in zip(layer, row, strict=True) if cost <= lowest + room]
        for layer, row, lowest in zip(layers, costs, least, strict=True)
    ]
    return kept, room


def reachable(layers: Sequence[Layer], steps: Iterable[Step]) -> list[tuple[int, int]]:
    """The least size of the relaxation for every error, a convex function.

    Args:
        layers: undominated items; may be none.
        steps: those of the layers, in order.

    Returns:
        Its corners (error, size) in ascending order of errors.
    """
    first = total([State(0, 0, 0), *(layer[0] for layer in layers)])
    corners = [(first.error, first.size)]
    for step in steps:
        error, size = corners[-1]
        corners.append((error + step.error, size - step.saved))
    error, size = corners[-1]
    return [*corners, (error + 1, size)]  # more error saves nothing


def viable(
    ascending: Iterable[_T], corners: Sequence[tuple[int, int]], limit: int, size: int
) -> Iterator[tuple[int, _T]]:
    """The states that may lead to no more than this size.

    Args:
        ascending: states, in ascending order of errors.
        corners: what the layers that they lack can reach.
        limit: of the total error.
        size: of a choice within the limit.

    Yields:
        A number, less where less size may be reached, and the state.
    """
    at = len(corners) - 2
    for state in ascending:
        rest = limit - state[0]
        while at >= 0 and corners[at][0] > rest:
            at -= 1
        if at < 0:
            return
        (start, above), (end, below) = corners[at : at + 2]
        width = end - start
        excess = (state[1] + above - size) * width - (above - below) * (rest - start)
        if excess <= 0:
            yield (excess << PLACES) // width, state
