"""Checkpoints in files, from which training goes on after any worker was killed.

Every worker writes a file of its own: its errors, random numbers and BatchNorm statistics are those
of no other. A checkpoint is complete when every worker has its file of that step. A worker may
die between the others' writes, so each keeps its last two files. That is enough: nobody finishes
a step without all others, hence nobody writes a third file before all have written the second.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from examples.distributed import Workers
from examples.files import UNFINISHED, replacing

NAME = "step-{step:08}-worker-{worker}-of-{world_size}.pt"
PATTERN = re.compile(r"step-(\d+)-worker-(\d+)-of-(\d+)\.pt")


class Checkpoints:
    """The files of one training in a folder.

    Args:
        folder: where the files are, seen by all workers; made when the first is written.
        every: the number of steps from one checkpoint to the next.
        workers: the group this worker belongs to.
        run: what is trained and how, as texts; only a checkpoint of the same is loaded.
    """

    def __init__(self, folder: Path, every: int, workers: Workers, run: Mapping[str, str]) -> None:
        if every < 1:
            raise ValueError(f"Invalid every: {every}. Must be at least 1 step.")
        self.folder, self.every, self.workers, self.run = folder, every, workers, dict(run)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint belongs after this step, counted from 1."""
        return step % self.every == 0

    def save(self, step: int, content: Mapping[str, Any]) -> None:
        """Writes this worker's file of a step, and deletes those before the last two.

        Args:
            step: the number of steps taken, the same on all workers.
            content: tensors, numbers and texts, in dicts and lists.
        """
        with replacing(self._path(step)) as file:
            torch.save({"run": self.run, "step": step, "content": dict(content)}, file)
        for old in self._own_steps()[:-2]:
            self._path(old).unlink()

    def load(self) -> Any | None:
        """This worker's part of the newest complete checkpoint. Every worker must call it.

        What this worker has of later steps, which others lack, is deleted, so that no checkpoint is
        ever completed with files of different attempts.

        Returns:
            The `content` that was saved, on the CPU; None where there is nothing to go on from.

        Raises:
            ValueError: on all workers, if files are damaged or missing, or belong to another run or
                another number of workers.
        """
        worker, world_size = self.workers.worker, self.workers.world_size
        own = f"step-*-worker-{worker}-of-{world_size}.pt{UNFINISHED}"
        for unfinished in self.folder.glob(own):
            unfinished.unlink()
        step = self._newest_complete()
        if step is None:
            return None
        saved, problem = self._read(step)
        problems = [each for each in self.workers.gather(problem) if each]
        if problems:
            raise ValueError(problems[0])
        for later in self._own_steps():
            if later > step:
                self._path(later).unlink()
        if self.workers.is_first:
            print(f"resumed at step {step} from {self.folder}", flush=True)
        return saved["content"]

    def _path(self, step: int) -> Path:
        worker, world_size = self.workers.worker, self.workers.world_size
        return self.folder / NAME.format(step=step, worker=worker, world_size=world_size)

    def _found(self) -> list[tuple[int, int, int]]:
        """Step, worker and number of workers of all files in the folder."""
        matches = [PATTERN.fullmatch(path.name) for path in self.folder.glob("step-*.pt")]
        return [(int(m[1]), int(m[2]), int(m[3])) for m in matches if m]

    def _own_steps(self) -> list[int]:
        worker, world_size = self.workers.worker, self.workers.world_size
        return sorted(s for s, w, count in self._found() if (w, count) == (worker, world_size))

    def _newest_complete(self) -> int | None:
        """The newest step of which every worker has its file; None if there is no file yet."""
        world_size = self.workers.world_size
        others = sorted({count for *_, count in self._found() if count != world_size})
        answers = self.workers.gather((self._own_steps(), others))
        for _, sizes in answers:
            if sizes:
                raise ValueError(
                    f"{self.folder} has checkpoints of {sizes[0]} workers, and this run has "
                    f"{world_size}. Start as many as before, or give an empty folder: shares of "
                    "the data and errors belong to single workers."
                )
        owned = [set(steps) for steps, _ in answers]
        complete = set.intersection(*owned)
        if not complete and max(map(len, owned)) > 1:
            lists = "; ".join(f"worker {w}: {sorted(steps)}" for w, steps in enumerate(owned))
            raise ValueError(
                f"{self.folder} has files of several steps, but no step of all workers ({lists}). "
                "All workers must see the same folder. If files are lost, give an empty one."
            )
        return max(complete, default=None)

    def _read(self, step: int) -> tuple[Any, str | None]:
        """What this worker has saved, and what is wrong with it."""
        path = self._path(step)
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            run = saved["run"]
        except Exception as error:  # torch raises whatever the damaged bytes led to
            return None, (
                f"{path} is damaged ({type(error).__name__}). Delete all files of step {step} to "
                "go on from an older checkpoint, or from the beginning."
            )
        for name in sorted({*run, *self.run}):
            before, now = run.get(name), self.run.get(name)
            if before != now:
                return None, (
                    f"{path} is of a training with {name} {before}, and this one has {now}. "
                    "Give an empty folder, or the same settings."
                )
        return saved, None
