"""The search for a learning rate: what is trained, with which rates, and what came of it."""

import math
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

#: Records that are trained on, of all workers together.
RECORDS = 960
NONE = "None"
#: At most so many times is the best rate halved or doubled.
MOST_ROUNDS = 6


@dataclass(frozen=True)
class Case:
    """A row of a table: everything but the seed, and the learning rate where it is tuned.

    Attributes:
        noise_multiplier: σ, of the noise of each worker.
        compression: its name.
        error_feedback: whether what is not sent is kept for the next step.
        batch_size: expected records in a step, of all workers together.
        steps: of a training.
        given_lr: the learning rate; None tunes it.
    """

    noise_multiplier: float
    compression: str
    error_feedback: bool
    batch_size: int
    steps: int
    given_lr: float | None = None

    @property
    def sample_rate(self) -> float:
        """The probability with which a record takes part in a step."""
        return self.batch_size / RECORDS

    def first_rate(self) -> float:
        """What the search begins with, a power of two that is lower where noise is larger."""
        if self.given_lr is not None:
            return self.given_lr
        noise = self.noise_multiplier * 128 / self.batch_size
        return 2.0 ** round(math.log2(4 / (1 + 3 * noise)))

    def tested_at(self) -> tuple[int, ...]:
        """The steps after which accuracies are taken, the last one among them."""
        return tuple(sorted({math.ceil(self.steps * part) for part in (0.1, 0.2, 0.4, 0.7, 1)}))


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        case: what is trained.
        lr: the learning rate.
        seed: of the model, the batches, the noise and the compressor.
    """

    case: Case
    lr: float
    seed: int


@dataclass
class Outcome:
    """What one training did; lists have one entry for each of `Case.tested_at`.

    Attributes:
        trial: the training.
        steps: steps taken.
        bytes_sent: bytes each worker had handed to collectives for these steps.
        validation: accuracy in percent on images with which the learning rate is chosen.
        test: accuracy in percent on the test set.
    """

    trial: Trial
    steps: list[int] = field(default_factory=list)
    bytes_sent: list[int] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)

    def add(self, step: int, bytes_sent: int, validation: float, test: float) -> None:
        """Adds what was found after a step."""
        self.steps.append(step)
        self.bytes_sent.append(bytes_sent)
        self.validation.append(validation)
        self.test.append(test)


class Tuning(AbstractContextManager["Tuning"]):
    """Trains each case with its best learning rate; what was trained once is not trained again.

    Attributes:
        outcomes: of all trainings so far.

    Args:
        train: one training.
        seeds: the rate is tuned with the first of them, and kept for the others.
        processes: how many train at the same time; 1 is this one.
    """

    def __init__(
        self, train: Callable[[Trial], Outcome], seeds: int = 1, processes: int = 1
    ) -> None:
        self.outcomes: dict[Trial, Outcome] = {}
        self._train, self._seeds, self._pool = train, seeds, None
        if processes > 1:
            context = multiprocessing.get_context("spawn")
            start = partial(torch.set_num_threads, 1)
            self._pool = context.Pool(processes, initializer=start)

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            self._pool.terminate()

    def run(self, cases: Sequence[Case], title: str = "") -> dict[Case, list[Outcome]]:
        """The trainings of each case with its best rate, one for each seed.

        The best rate is that of the highest accuracy on the validation part. Rates are halved and
        doubled until the best lies between two that are worse.
        """
        rates = {case: [case.first_rate()] for case in cases}
        for number in range(MOST_ROUNDS):
            trials = [Trial(case, lr, 1) for case, own in rates.items() for lr in own]
            if not self._run(trials, f"{title}, round {number + 1} of learning rates"):
                break
            rates = {case: self._around(case) for case in cases}
        best = {case: self.best_rate(case) for case in cases}
        seeds = range(1, self._seeds + 1)
        self._run([Trial(c, best[c], s) for c in cases for s in seeds], f"{title}, further seeds")
        return {c: [self.outcomes[Trial(c, best[c], seed)] for seed in seeds] for c in cases}

    def best_rate(self, case: Case) -> float:
        """Of those that were tried; of equally good ones the lowest."""
        found = [o for t, o in self.outcomes.items() if t.case == case and t.seed == 1]
        return max(found, key=lambda outcome: (outcome.validation[-1], -outcome.trial.lr)).trial.lr

    def _around(self, case: Case) -> list[float]:
        best = self.best_rate(case)
        return [best / 2, best * 2] if case.given_lr is None else []

    def _run(self, trials: Iterable[Trial], title: str) -> bool:
        """Whether any of these trainings is new."""
        new = [trial for trial in dict.fromkeys(trials) if trial not in self.outcomes]
        each = map if self._pool is None else self._pool.imap_unordered
        console = Console(stderr=True)
        shown = track(
            each(self._train, new), title, len(new), console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        for outcome in shown:
            self.outcomes[outcome.trial] = outcome
        return bool(new)
