"""Several exchanges at once: one computes while the collectives of others travel."""

from collections import deque
from collections.abc import Sequence
from typing import Any, TypeVar, cast

from efsgd.wire.collectives import Collective, Exchange, InFlight, Request, Start

T = TypeVar("T")


def together(exchanges: Sequence[Exchange[T]]) -> Exchange[list[T]]:
    """Takes part in several exchanges by turns, each up to where it waits for others.

    The first collective of each is started, one exchange after the other, then the second of each,
    and so on; and each is started before the one that precedes it is awaited. So the order depends
    on the exchanges' own collectives alone, and results are the same bits as one after the other.

    Args:
        exchanges: of which none touches what another one sends or keeps.

    Returns:
        The result of each.

    Raises:
        Exception: what the first of them raises. The others are closed where they are.

    Example:
        >>> from efsgd.testing import lockstep
        >>> from efsgd.wire.collectives import AllReduceMean
        >>> from efsgd.wire.together import together
        >>> def twice(name):
        ...     yield AllReduceMean(torch.zeros(2), f"P of {name}")
        ...     yield AllReduceMean(torch.zeros(2), f"Q of {name}")
        >>> trace = lockstep([together([twice("a"), twice("b")]) for worker in range(2)]).trace
        >>> [each.purpose for each in trace]
        ['P of a', 'P of b', 'Q of a', 'Q of b']
    """
    if len(exchanges) == 1:
        return [(yield from exchanges[0])]
    results: dict[int, T] = {}
    turns: deque[tuple[int, InFlight | None]] = deque((n, None) for n in range(len(exchanges)))
    try:
        while turns:
            number, awaited = turns.popleft()
            outcome = yield from _until_it_waits(exchanges[number], awaited)
            if isinstance(outcome, InFlight):
                turns.append((number, outcome))
            else:
                results[number] = outcome[0]
    finally:
        for exchange in exchanges:
            exchange.close()
    return [results[number] for number in range(len(exchanges))]


def one_by_one(exchanges: Sequence[Exchange[T]]) -> Exchange[list[T]]:
    """Takes part in one exchange after the other; each may wait before it asks for anything."""
    results = []
    for exchange in exchanges:
        results.append((yield from exchange))
    return results


def _until_it_waits(
    exchange: Exchange[T], awaited: InFlight | None
) -> Exchange[InFlight | tuple[T]]:
    """Answers an exchange until it waits for what is in flight, which is returned, or ends."""
    request: Request | None = awaited
    while True:
        answer: Any = None
        failure: Exception | None = None
        waits = isinstance(request, Collective)
        try:
            if request is not None:
                answer = yield Start(request) if isinstance(request, Collective) else request
        except Exception as error:  # is raised at the line that asked
            failure = error
        if waits and failure is None:
            return cast(InFlight, answer)
        try:
            request = exchange.send(answer) if failure is None else exchange.throw(failure)
        except StopIteration as end:
            return (end.value,)
        if isinstance(request, InFlight):
            return request
