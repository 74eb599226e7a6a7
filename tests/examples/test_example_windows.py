"""The examples' training loop with a rank scheduler: when it decides, and what a checkpoint has."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from efsgd import PowerSGDOptimizer
from efsgd.rank import Accordion, LGreCo, RankScheduler
from examples.checkpointing import Checkpoints
from examples.distributed import Workers
from examples.training import Training, parameter_groups, prepare, seed_worker
from tests.checkpoint.killed_worker import EPOCHS, STEPS, STEPS_PER_EPOCH, digest, make_task

ALONE = Workers(0, 1, torch.device("cpu"))


class Noting(RankScheduler):
    """Keeps the learning rates that it is called with."""

    def step(self) -> None:
        self.lrs = [*getattr(self, "lrs", []), self.optimizer.param_groups[0]["lr"]]
        super().step()


def make_training(windows_per_epoch: int) -> Training:
    prepare(ALONE, seed=3)
    task, model, settings = make_task("images", ALONE)
    settings = replace(settings, windows_per_epoch=windows_per_epoch, decay_at=(0.625,))
    groups = parameter_groups(model, settings.weight_decay)
    optimizer = PowerSGDOptimizer(groups, **settings.of_ours(), rank=1)
    reference = Accordion(1, 2, interval=2, sketch=64)
    policy = LGreCo(reference, interval=3, observations=2, sketch=64)
    scheduler = Noting(optimizer, policy)
    seed_worker(3, 0)
    return Training(task, model, optimizer, settings, ALONE, 3, scheduler)


class Killed(Exception):
    """Ends a training."""


def report_until(last: int) -> Any:
    def report(step: int, loss: float, quality: float) -> None:
        if step == last:
            raise Killed

    return report


@pytest.mark.parametrize("windows_per_epoch", [1, 3, 10])
def test_windows_cut_epochs_into_parts_and_the_last_one_needs_no_decision(
    windows_per_epoch: int,
) -> None:
    training = make_training(windows_per_epoch)
    history = training.run()
    ends = [
        epoch * STEPS_PER_EPOCH + min(
            batch
            for batch in range(1, STEPS_PER_EPOCH + 1)
            if batch / STEPS_PER_EPOCH >= part / windows_per_epoch
        )
        for epoch in range(EPOCHS)
        for part in range(1, windows_per_epoch + 1)
    ]  # fmt: skip
    assert history.windows == [0, *ends[:-1]] and ends[-1] == STEPS
    assert isinstance(training.scheduler, Noting)
    assert training.scheduler.lrs == history.lrs[1:]
    # A decision follows the rate of the step after it: the rate falls after step 38.
    assert history.lrs == [0.01 if end < 38 else 0.001 for end in history.windows]
    assert {len(ranks) for ranks in history.ranks.values()} == {len(ends)}


@pytest.fixture(scope="module")
def whole() -> Training:
    """A training from beginning to end."""
    training = make_training(3)
    training.run()
    return training


# After a decision, in the middle of a window, and at the end of an epoch.
@pytest.mark.parametrize("saved_at", [34, 36, 40])
def test_a_resumed_training_has_the_same_ranks_and_decisions(
    whole: Training, tmp_path: Path, saved_at: int
) -> None:
    history = whole.progress.history
    first, second = make_training(3), make_training(3)
    checkpoints = Checkpoints(tmp_path, saved_at, ALONE, {})
    with pytest.raises(Killed):
        first.run(report_until(saved_at + 3), checkpoints)
    resumed = second.run(checkpoints=checkpoints)
    assert dict(digest(second.state_dict())) == dict(digest(whole.state_dict()))
    assert asdict(resumed)["ranks"] == asdict(history)["ranks"]
    assert resumed.decision_bytes_sent == history.decision_bytes_sent > 0
    assert resumed.bytes_sent == history.bytes_sent
    assert any(len(set(ranks[6:])) > 1 for ranks in history.ranks.values())
