"""Workers killed by SIGKILL, restarted by torchrun: the training ends as if nothing had been.

These are two kills of `make test-kill`, which has many, at random.
"""

import random
from pathlib import Path

import pytest

from tests.checkpoint.kill_and_resume import (
    WORDS,
    Ending,
    Kill,
    describe,
    differences,
    draw,
    launch,
)
from tests.checkpoint.killed_worker import EVERY, STEPS

pytestmark = pytest.mark.xdist_group("processes")


@pytest.mark.slow
def test_a_training_that_is_killed_twice_ends_bitwise_as_if_it_was_not(tmp_path: Path) -> None:
    whole = launch("text", 2, [], tmp_path / "whole")
    assert (whole.lives, whole.resumed) == (1, [])
    names = set(whole.states[0])
    for kind in ("error", "q", "momentum_buffer"):
        assert f"optimizer.state.0.{kind}" in names
    assert {"model.encoder.weight", "random.cpu", "task.hidden", "progress.losses"} <= names
    assert differences(whole, Ending(1, [], whole.states[::-1]))  # errors are each worker's own
    kills = [
        Kill(life=0, worker=0, step=23, point="collective", amount=1),
        Kill(life=1, worker=1, step=30, point="writing", amount=50),
    ]
    killed = launch("text", 2, kills, tmp_path / "killed")
    # Worker 0 had written its file of step 30 when worker 1 was killed, or not: it does not count.
    assert (killed.lives, killed.resumed) == (3, [20, 25])
    assert differences(killed, whole) == []


def test_random_kills_come_to_pass_in_every_way() -> None:
    kills = [draw(random.Random(seed), world_size=4) for seed in range(2000)]
    flat = [kill for of_run in kills for kill in of_run]
    assert {kill.point for kill in flat} == set(WORDS)
    assert {kill.worker for kill in flat} == {0, 1, 2, 3}
    assert {len(of_run) for of_run in kills} == {1, 2}
    for of_run in kills:
        steps = [kill.step for kill in of_run]
        # A life may resume as late as at the kill before, and the next is still to come.
        assert steps == sorted(set(steps)) and steps[0] > 0 and steps[-1] < STEPS
        assert [kill.life for kill in of_run] == list(range(len(of_run)))
    for kill in flat:
        assert kill.point in ("step", "collective") or kill.step % EVERY == 0
        assert kill.point != "deleted" or kill.step > 2 * EVERY
        assert "{" not in describe(kill)
