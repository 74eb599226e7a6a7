"""Names for the phases of a step, in torch.profiler, and on request the time each one takes."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

# A range costs microseconds also where nobody looks at it.
_NOTHING: AbstractContextManager[Any] = nullcontext()


class Phases:
    """The phases of one optimizer's steps.

    Every phase is a range of its name in torch.profiler. Time is taken only while `is_timing`,
    since on an accelerator it can only be told by waiting until all work is done.

    Attributes:
        is_timing: whether time is taken. May change between steps.
        seconds: of the last step, by name.
        devices: that are waited for before the time is told.

    Example:
        >>> from efsgd.profiling import Phases
        >>> phases = Phases()
        >>> phases.is_timing = True
        >>> with phases("Alg. 1, line 3: P = MQ"):
        ...     pass
        >>> list(phases.seconds)
        ['Alg. 1, line 3: P = MQ']
    """

    def __init__(self) -> None:
        self.is_timing = False
        self.seconds: dict[str, float] = {}
        self.devices: set[torch.device] = set()

    def begin_step(self) -> None:
        """What follows belongs to another step."""
        self.seconds = {}

    def __call__(self, name: str) -> AbstractContextManager[Any]:
        """Everything within the `with` block belongs to the phase `name`."""
        if self.is_timing:
            return self._timed(name)
        return record_function(name) if torch._C._autograd._profiler_enabled() else _NOTHING

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = self._now()
        with record_function(name):
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._now() - began

    def _now(self) -> float:
        for device in self.devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        return time.perf_counter()
