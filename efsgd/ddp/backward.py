"""One backward pass: gradients that arrive bucket by bucket, and the thread that averages them."""

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

# A job, and with how many threads it computes; None is the end.
_Jobs: TypeAlias = "queue.SimpleQueue[tuple[Callable[[], None], int] | None]"


@dataclass
class Pass:
    """The gradients of one backward pass, as far as they are there.

    Attributes:
        views: where each parameter's mean is written, by parameter: parts of DDP's buckets.
        answers: what DDP waits for, with the bucket that it gets.
        is_averaged: whether gradients were averaged; None as long as that is not known.
        error: why they were not; raised once, by who asks first.
    """

    views: dict[Tensor, Tensor] = field(default_factory=dict)
    answers: list[tuple[Any, Tensor]] = field(default_factory=list)
    is_averaged: bool | None = None
    error: BaseException | None = None
    _is_whole: bool = False
    _failure: Exception | None = None
    _news: threading.Condition = field(default_factory=threading.Condition)
    _end: threading.Event = field(default_factory=threading.Event)

    def add(self, views: dict[Tensor, Tensor], answer: tuple[Any, Tensor], *, last: bool) -> None:
        """A bucket of gradients is there."""
        with self._news:
            self.answers.append(answer)
            self._is_whole = self._is_whole or last
            if self.is_over:  # the exchange has failed before this bucket was there
                self._answer()
            else:
                self.views |= views
                self._news.notify_all()

    def break_off(self, failure: Exception) -> None:
        """No more gradients come: whoever waits for them raises this."""
        with self._news:
            self._failure = self._failure or failure
            self._news.notify_all()

    @property
    def is_whole(self) -> bool:
        """Whether the last bucket is there."""
        return self._is_whole

    @property
    def is_over(self) -> bool:
        """Whether DDP has got its answers."""
        return self._end.is_set()

    def wait_for(self, parameters: Sequence[Tensor] | None) -> None:
        """Waits for the gradients of some parameters, or of all."""

        def is_there() -> bool:
            if self._is_whole or self._failure is not None:
                return True
            return parameters is not None and self.views.keys() >= set(parameters)

        with self._news:
            self._news.wait_for(is_there)
            if self._failure is not None:
                raise self._failure

    def end(self) -> None:
        """Gives DDP its answers: buckets, with whatever is in them now."""
        with self._news:
            self._answer()
            self.views.clear()
            self._end.set()

    def join(self) -> None:
        """Waits for the end."""
        self._end.wait()

    def _answer(self) -> None:
        for future, bucket in self.answers:
            future.set_result(bucket)
        self.answers.clear()


class Worker:
    """Runs one job after the other, in a thread that the first one starts.

    It computes with as many threads as who gives the job, and ends with this object. Those of
    concurrent.futures would keep a program alive that waits for a worker which has died.
    """

    def __init__(self) -> None:
        self._jobs: _Jobs | None = None

    def give(self, job: Callable[[], None]) -> None:
        """Has a job done, which raises nothing."""
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            name = "efsgd gradient exchange"
            threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)
        self._jobs.put((job, torch.get_num_threads()))

    def __getstate__(self) -> dict[str, Any]:
        return {"_jobs": None}  # a copy has a thread of its own


def _work(jobs: _Jobs) -> None:
    while (given := jobs.get()) is not None:
        job, threads = given
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        job()
        del job, given  # what they hold is free while the thread waits
