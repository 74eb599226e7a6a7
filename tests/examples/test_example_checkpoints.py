"""The examples' checkpoint files: complete or not there, of all workers or of no use."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from examples.checkpointing import Checkpoints
from examples.distributed import Workers
from examples.files import UNFINISHED, replacing

RUN = {"rank": "4"}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Threads(Workers):
    """Workers that are threads; `gather` meets at a barrier."""

    barrier: Barrier = field(default_factory=lambda: Barrier(1))
    table: list[Any] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        self.table[self.worker] = value
        self.barrier.wait(timeout=30)
        values = list(self.table)
        self.barrier.wait(timeout=30)
        return values


def together(world_size: int, folder: Path, action: Callable[[Checkpoints], Any]) -> list[Any]:
    """What each worker's `action` returns, or the error that it raises."""
    shared = {"barrier": Barrier(world_size), "table": [None] * world_size}

    def act(worker: int) -> Any:
        checkpoints = Checkpoints(folder, 10, Threads(worker, world_size, CPU, **shared), RUN)
        try:
            return action(checkpoints)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(act, range(world_size)))


def save(step: int, *workers: int) -> Callable[[Checkpoints], None]:
    """Saves a step on some workers; the others were killed before they could."""

    def action(checkpoints: Checkpoints) -> None:
        worker = checkpoints.workers.worker
        if worker in workers:
            checkpoints.save(step, {"step": step, "own": torch.full((3,), float(worker))})

    return action


def steps_of(loaded: list[Any]) -> list[int]:
    """The step that each worker has loaded; all must have their own file of it."""
    for worker, content in enumerate(loaded):
        assert content["own"].tolist() == [worker] * 3
    return [content["step"] for content in loaded]


def load(checkpoints: Checkpoints) -> Any:
    return checkpoints.load()


def test_a_folder_without_checkpoints_is_a_new_training(tmp_path: Path) -> None:
    assert together(2, tmp_path / "none", load) == [None, None]


def test_the_newest_step_that_all_have_is_loaded(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        together(3, tmp_path, save(step, 0, 1, 2))
    together(3, tmp_path, save(40, 0, 2))  # worker 1 was killed between the others' writes
    assert steps_of(together(3, tmp_path, load)) == [30, 30, 30]
    # Had the files of step 40 stayed, worker 1's next one would complete them.
    assert not list(tmp_path.glob("step-00000040*"))
    together(3, tmp_path, save(40, 1))
    assert steps_of(together(3, tmp_path, load)) == [30, 30, 30]


def test_a_first_checkpoint_that_some_lack_is_no_checkpoint(tmp_path: Path) -> None:
    together(2, tmp_path, save(10, 1))
    assert together(2, tmp_path, load) == [None, None]


def test_two_steps_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        together(2, tmp_path, save(step, 0, 1))
    assert {path.name.partition("-worker")[0] for path in tmp_path.iterdir()} == {
        "step-00000030",
        "step-00000040",
    }
    assert len(list(tmp_path.iterdir())) == 4


def test_a_failure_while_writing_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(OSError, match="full"), replacing(path) as file:
        file.write(b"half of")
        raise OSError("the disk is full")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("file", "before")]
    seen: list[tuple[str, str]] = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (seen.append((a.read_text(), path.read_text())), replace(a, b))
    )
    with replacing(path) as file:
        file.write(b"after")
    assert seen == [("after", "before")]  # it was whole before it had the name
    assert path.read_text() == "after"


def test_what_a_killed_worker_has_not_finished_is_ignored_and_removed(tmp_path: Path) -> None:
    together(2, tmp_path, save(10, 0, 1))
    half = tmp_path / f"step-00000020-worker-1-of-2.pt{UNFINISHED}"
    half.write_bytes(b"PK")
    together(2, tmp_path, save(20, 0))
    assert steps_of(together(2, tmp_path, load)) == [10, 10]
    assert not half.exists()


@pytest.mark.parametrize("part", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_an_error_on_all_workers(tmp_path: Path, part: float) -> None:
    together(2, tmp_path, save(10, 0, 1))
    together(2, tmp_path, save(20, 0, 1))
    path = tmp_path / "step-00000020-worker-1-of-2.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    first, second = together(2, tmp_path, load)
    assert first == second
    for words in (path.name, "is damaged", "Delete all files of step 20", "an older checkpoint"):
        assert words in first
    for file in tmp_path.glob("step-00000020*"):  # what the message says is the remedy
        file.unlink()
    assert steps_of(together(2, tmp_path, load)) == [10, 10]


def load_as_another_run(checkpoints: Checkpoints) -> Any:
    checkpoints.run = {"rank": "2"}
    return checkpoints.load()


@pytest.mark.parametrize(
    ("world_size", "lost", "action", "words"),
    [
        (4, [], load, "of 4 workers, and this run has 2"),
        (2, [1], load, "worker 0: [10, 20]; worker 1: []"),
        (2, [], load_as_another_run, "with rank 4, and this one has 2"),
    ],
    ids=["another number of workers", "lost files", "another run"],
)
def test_what_another_run_has_left_is_an_error_on_all_workers_and_not_a_new_start(
    tmp_path: Path, world_size: int, lost: list[int], action: Any, words: str
) -> None:
    for step in (10, 20):
        together(world_size, tmp_path, save(step, *range(world_size)))
    for worker in lost:
        for path in tmp_path.glob(f"*-worker-{worker}-*"):
            path.unlink()
    first, second = together(2, tmp_path, action)
    assert first == second
    assert words in first


def test_when_a_checkpoint_is_due() -> None:
    checkpoints = Checkpoints(Path("nowhere"), 10, Workers(0, 1, CPU), RUN)
    assert [step for step in range(1, 31) if checkpoints.is_due(step)] == [10, 20, 30]
    with pytest.raises(ValueError, match="at least 1"):
        Checkpoints(Path("nowhere"), 0, Workers(0, 1, CPU), RUN)
