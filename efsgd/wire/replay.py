"""The collectives of a step, remembered: they are the same in every step.

So a worker can take part in a step of the others that it cannot compute itself, with zeros.
"""

import dataclasses

import torch
from torch import Tensor

from efsgd.wire.collectives import Collective, Exchange, InFlight, Request, Start


class Schedule:
    """What an exchange has asked for, in order, without the buffers' memory.

    Args:
        device: where the buffers are.

    Example:
        >>> from efsgd.wire.collectives import AllReduceMean, intercept, run
        >>> from efsgd.wire.replay import Schedule
        >>> from efsgd.wire.transports import Alone
        >>> def exchange():
        ...     yield AllReduceMean(torch.tensor([5.0, 6.0, 7.0]), "an example")
        >>> schedule = Schedule(torch.device("cpu"))
        >>> run(intercept(exchange(), lambda _: None, asking=schedule.note), Alone())
        >>> run(schedule.replay(torch.tensor([1.0])), Alone())
        tensor([1., 0., 0.])
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._requests: list[Collective | Start | int] = []
        self._started: list[Collective] = []

    def note(self, request: Request) -> None:
        """Remembers what was asked for next."""
        if isinstance(request, InFlight):
            numbers = [n for n, c in enumerate(self._started) if c is request.collective]
            self._requests.append(numbers[0])
        elif isinstance(request, Start):
            self._started.append(request.collective)
            self._requests.append(Start(_without_memory(request.collective)))
        else:
            self._requests.append(_without_memory(request))

    def end(self) -> None:
        """Nothing more is noted: lets go of buffers."""
        self._started.clear()

    def replay(self, head: Tensor) -> Exchange[Tensor]:
        """Asks for the same again, with zeros.

        Args:
            head: what the first buffer begins with instead.

        Returns:
            The first answer.
        """
        answers: list[Tensor] = []
        in_flight: list[InFlight] = []
        is_first = True
        for request in self._requests:
            if isinstance(request, int):
                answers.append((yield in_flight[request]))
                continue
            is_start = isinstance(request, Start)
            collective = request.collective if isinstance(request, Start) else request
            buffer = torch.zeros_like(collective.buffer, device=self._device)
            if is_first:
                buffer[: len(head)].copy_(head)
            collective, is_first = dataclasses.replace(collective, buffer=buffer), False
            if is_start:
                in_flight.append((yield Start(collective)))
            else:
                answers.append((yield collective))
        return answers[0]


def _without_memory(collective: Collective) -> Collective:
    return dataclasses.replace(
        collective, buffer=torch.empty_like(collective.buffer, device="meta")
    )
