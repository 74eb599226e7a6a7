"""One worker of `kill_and_resume.py`: a small training that is killed at chosen points.

    torchrun ... killed_worker.py TASK FOLDER KILLS

TASK is "images" or "text". Checkpoints go to FOLDER/checkpoints, and at the end each worker writes
a digest of all it holds to FOLDER/worker.json. KILLS is a list of `Kill`s, in JSON.
"""

import hashlib
import io
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from efsgd import PowerSGDOptimizer
from efsgd.wire.collectives import Collective
from efsgd.wire.transports import ProcessGroup
from examples.checkpointing import Checkpoints
from examples.data.images import ImageData
from examples.data.text import Corpus
from examples.distributed import Workers, join_workers
from examples.models import DigitsCNN, LSTMLanguageModel
from examples.settings import Settings
from examples.tasks import ImageClassification, LanguageModeling
from examples.training import Task, Training, parameter_groups, prepare, seed_worker

EVERY = 5  # steps from one checkpoint to the next: in the middle of epochs, and at their ends
STEPS_PER_EPOCH, EPOCHS, BATCH, WINDOW = 10, 6, 4, 4
STEPS = STEPS_PER_EPOCH * EPOCHS
OPTIONS: dict[str, Any] = {"epochs": EPOCHS, "batch_size": BATCH, "momentum": 0.9}
IMAGES = Settings(**OPTIONS, lr=0.01, decay_at=(0.6,), nesterov=True, weight_decay=1e-4)
TEXT = Settings(**OPTIONS, lr=0.1, warmup_epochs=1, momentum_form="paper")


@dataclass(frozen=True)
class Kill:
    """SIGKILL, at one point of a training.

    Attributes:
        life: the number of restarts before it.
        worker: who is killed.
        step: during which, or during the checkpoint after which, counted from 1.
        point: "step", `amount` milliseconds after it began; "collective", before its collective of
            number `amount` is handed over; and of a checkpoint: "writing", when `amount` percent of
            the bytes are written; "written", when all are, under the temporary name; "renamed",
            when the file is in its place; "deleted", when an old one has been deleted.
        amount: see above.
    """

    life: int
    worker: int
    step: int
    point: str
    amount: int = 0


def die() -> None:
    """Ends this process as the system does when memory is short: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # the signal may take a moment to arrive


def arm(kill: Kill, training: Training) -> None:
    """Has this process killed when it comes to the point."""
    if kill.point == "step":
        compute_loss = training.task.loss

        def loss(model: nn.Module, batch: Any) -> Tensor:
            if len(training.progress.seconds) + 1 == kill.step:
                threading.Timer(kill.amount / 1000, die).start()
            return compute_loss(model, batch)

        training.task.loss = loss
    elif kill.point == "collective":
        start, seen = ProcessGroup.start, []

        def start_or_die(group: ProcessGroup, collective: Collective) -> Any:
            if len(training.progress.seconds) + 1 == kill.step:
                seen.append(collective)
                if len(seen) > kill.amount:
                    die()
            return start(group, collective)

        ProcessGroup.start = start_or_die
    else:
        save = Checkpoints.save

        def save_or_die(checkpoints: Checkpoints, step: int, content: Any) -> None:
            if step == kill.step:
                arm_writing(kill)
            save(checkpoints, step, content)

        Checkpoints.save = save_or_die


def arm_writing(kill: Kill) -> None:
    """The same within the checkpoint that is about to be written."""
    save, replace, unlink = torch.save, os.replace, Path.unlink

    def write_a_part(content: Any, file: Any) -> None:
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.tell() * kill.amount // 100])
        file.flush()
        die()

    def replace_and_die(*names: Any) -> None:
        replace(*names)
        die()

    def unlink_and_die(path: Path, **options: Any) -> None:
        unlink(path, **options)
        die()

    match kill.point:
        case "writing":
            torch.save = write_a_part
        case "written":
            os.replace = lambda *names: die()
        case "renamed":
            os.replace = replace_and_die
        case "deleted":
            Path.unlink = unlink_and_die


def make_task(name: str, workers: Workers) -> tuple[Task, nn.Module, Settings]:
    """One of two trainings that between them have all that a checkpoint must hold.

    Images: BatchNorm's statistics, and random numbers that augment. Text: dropout, and the LSTM's
    state that goes from batch to batch.
    """
    if name == "images":
        count = workers.world_size * BATCH * STEPS_PER_EPOCH
        images = torch.randint(16, (count + 40, 1, 8, 8), dtype=torch.uint8)
        labels = torch.randint(10, (count + 40,))
        data = ImageData(images[40:], labels[40:], images[:40], labels[:40])
        task = ImageClassification(data, BATCH, workers, padding=1, flip=True)
        return task, DigitsCNN(width=4), IMAGES
    length = WINDOW * STEPS_PER_EPOCH + 1
    train = torch.randint(50, (workers.world_size * BATCH * length,))
    corpus = Corpus(tuple(map(str, range(50))), train, torch.randint(50, (400,)))
    task = LanguageModeling(corpus, BATCH, WINDOW, workers)
    return task, LSTMLanguageModel(50, 16, 16, 1, dropout=0.2), TEXT


def digest(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Names and contents of all that a nested value holds; of tensors, hashes of their bytes."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("seconds", "seconds_per_batch"):  # no two runs take the same time
                yield from digest(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"
    else:
        yield name, repr(value)


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    kills = [Kill(**kill) for kill in json.loads(sys.argv[3])]
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    with join_workers(timeout=timedelta(seconds=30)) as workers:
        prepare(workers, seed=3)
        task, model, settings = make_task(name, workers)
        groups = parameter_groups(model, settings.weight_decay)
        optimizer = PowerSGDOptimizer(groups, **settings.of_ours(), rank=1)
        seed_worker(3, workers.worker)
        training = Training(task, model, optimizer, settings, workers, seed=3)
        for kill in kills:
            if (kill.life, kill.worker) == (life, workers.worker):
                arm(kill, training)
        training.run(checkpoints=Checkpoints(folder / "checkpoints", EVERY, workers, {}))
    found = {"lives": life + 1, "state": dict(digest(training.state_dict()))}
    (folder / f"{workers.worker}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
