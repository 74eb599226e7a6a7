"""What a worker sends that meets an error while others count on it.

What it has sent says that all is well. So what is left becomes NaN: means of it are NaN on all
workers, who find so that the step cannot be applied. Nobody waits for a worker that has stopped.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from efsgd.wire.collectives import (
    AllReduceMean,
    Collective,
    Exchange,
    InFlight,
    Start,
    intercept,
)
from efsgd.wire.control_words import ControlWords

T = TypeVar("T")


def spoil_rest(
    exchange: Exchange[Any], control: ControlWords, record: Callable[[Collective], None]
) -> Exchange[bool]:
    """Sends what is left of an exchange that has stopped.

    Args:
        exchange: the same one anew, of zeros; what was sent before is not sent again.
        control: knows what was.
        record: called with each collective that is.

    Returns:
        Whether the others find it: not where nothing is left that is a mean.
    """
    sent, own, is_found = control.sent, set[Collective](), False
    answer: Any = None
    for pending in list(control.in_flight.values()):
        answer = yield pending
    answer = None
    while True:
        try:
            request = exchange.send(answer)
        except StopIteration:
            return is_found
        collective = request if isinstance(request, Collective) else request.collective
        if not isinstance(request, InFlight):
            if sent:
                sent -= 1
                own.add(collective)
            else:
                is_found = _spoil_(collective) or is_found
                record(collective)
        if collective not in own:
            answer = yield request
        elif isinstance(request, Start):
            answer = InFlight(collective, torch.Tensor)  # is answered here
        else:
            answer = collective.combine([collective.buffer] * control.world_size)[0]


def spoil_once(
    error: Callable[[], Exception | None], exchange: Exchange[T], control: ControlWords
) -> Exchange[T]:
    """The same exchange, spoiled from where this worker has an error in the step.

    Its first collective, which has control words, is left alone.
    """

    def outgoing(collective: Collective) -> None:
        if control.sent > 1 and error() is not None:
            _spoil_(collective)

    return intercept(exchange, outgoing)


def _spoil_(collective: Collective) -> bool:
    """Makes the answer NaN on all workers, if it is a mean. Returns whether it is."""
    is_mean = isinstance(collective, AllReduceMean)
    if is_mean:
        collective.buffer.fill_(math.nan)
    return is_mean
