"""The example scripts, run as the README says, for as short as they allow."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.examples.test_example_data import write_cifar10
from tests.launcher import LIMIT, ROOT, Finished, environment, run_programs

pytestmark = pytest.mark.xdist_group("processes")

TORCHRUN = ("-m", "torch.distributed.run", "--standalone")
IMAGES = ("examples/image_classification.py", "--epochs", "3", "--rank", "2")


def run(*command: str, workers: int = 1) -> Finished:
    """Runs a script with its arguments from the root of the repository."""
    return run_programs(command, workers)


def results_of(folder: Path, name: str) -> dict[str, Any]:
    assert (folder / f"{name}.png").stat().st_size > 10_000
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


Launched = tuple[Finished, Path]


@pytest.fixture(scope="module")
def images_on_two_workers(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """A launch of the script for images, and the folder of its results."""
    folder = tmp_path_factory.mktemp("images")
    return run(*IMAGES, "--output", str(folder), workers=2), folder


def test_images_on_two_workers(images_on_two_workers: Launched) -> None:
    done, folder = images_on_two_workers
    assert done.returncode == 0, done.stderr
    assert "Rank 2: test accuracy" in done.stdout
    history = results_of(folder, "image_classification")["history"]
    assert history["quality"][-1] > 70  # guessing gives 10
    assert history["steps"] == [0, 37, 74, 111]
    # Rank 2 of the four matrices, norms and biases; then the control words of 11 and 2.
    matrices = [(32, 9), (64, 288), (128, 576), (10, 512)]
    floats = sum(2 * (n + m) for n, m in matrices) + 2 * (32 + 64 + 128) + 10 + 11 + 2
    assert history["bytes_sent"] == [steps * 4 * floats for steps in history["steps"]]
    assert history["bytes_per_epoch"] == 37 * 4 * floats


@pytest.mark.slow
def test_a_worker_is_killed_and_torchrun_goes_on_from_the_checkpoint(
    images_on_two_workers: Launched, tmp_path: Path
) -> None:
    command = [sys.executable, *TORCHRUN, "--nproc-per-node=2", "--max-restarts=3", *IMAGES]
    command += ["--output", str(tmp_path), "--checkpoint", str(tmp_path / "checkpoints")]
    command += ["--checkpoint-every", "20"]
    torchrun = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end = time.monotonic() + LIMIT
        while len(list(tmp_path.glob("checkpoints/step-*.pt"))) < 2:  # one of each worker
            assert torchrun.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children")
        if not children.is_file():
            pytest.skip("the workers of torchrun are known on Linux only")
        os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
        output, errors = torchrun.communicate(timeout=LIMIT)
    finally:
        torchrun.terminate()
        torchrun.wait(timeout=60)
    assert torchrun.returncode == 0, errors
    assert "resumed at step" in output
    whole = results_of(images_on_two_workers[1], "image_classification")["history"]
    history = results_of(tmp_path, "image_classification")["history"]
    for each in (history, whole):
        each.pop("seconds_per_batch"), each.pop("seconds")
    assert str(history) == str(whole)  # as text, in which nan equals itself


def test_text_on_one_worker_without_torchrun_and_resumed(tmp_path: Path) -> None:
    command = ["examples/language_modeling.py", "--epochs", "1", "--batch-size", "64"]
    command += ["--checkpoint", str(tmp_path / "checkpoints"), "--checkpoint-every", "30"]
    histories = []
    for name in ("whole", "resumed"):  # the second goes on from the last checkpoint of the first
        done = run(*command, "--output", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert ("resumed at step 60" in done.stdout) == (name == "resumed")
        history = results_of(tmp_path / name, "language_modeling")["history"]
        assert history["quality"][-1] < 0.6 * history["quality"][0]  # that of 500 words by chance
        assert history.pop("seconds_per_batch") > 0 and history.pop("seconds") > 0
        histories.append(str(history))
    assert histories[0] == histories[1]
    done = run(*command, "--rank", "2")
    assert done.returncode != 0
    assert "with rank 4, and this one has 2" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_paper_s_models_on_files_in_the_real_formats(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    options = ["--data", str(tmp_path), "--epochs", "1", "--output", str(tmp_path)]
    done = run("examples/image_classification.py", *options, "--batch-size", "8")
    assert done.returncode == 0, done.stderr
    floats = 154_910 + 62 + 1  # of the paper at rank 4, and the control words of one worker
    history = results_of(tmp_path, "image_classification")["history"]
    assert history["bytes_per_epoch"] == 4 * floats
    (tmp_path / "wiki.train.tokens").write_text("the cat sat on the mat \n" * 40)
    (tmp_path / "wiki.test.tokens").write_text("the mat sat on the cat \n" * 10)
    done = run("examples/language_modeling.py", *options, "--batch-size", "4")
    assert done.returncode == 0, done.stderr
    assert results_of(tmp_path, "language_modeling")["settings"]["momentum_form"] == "paper"


def test_metrics_are_logged_and_plotted(tmp_path: Path) -> None:
    options = ("--ranks", "2", "--epochs", "1", "--every", "20", "--output", str(tmp_path))
    done = run("examples/metrics.py", *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "metrics.png").stat().st_size > 10_000
    has_events = any((tmp_path / "metrics" / "rank-2").glob("events.*"))
    assert has_events != ("tensorboard is not installed" in done.stderr)


def test_missing_files_are_named() -> None:
    done = run("examples/image_classification.py", "--data", "nowhere")
    assert done.returncode != 0
    assert "data_batch_1.bin" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "methods", "tasks", "seeds"),
    [
        ("compare_ranks", ["SGD", "Rank 1", "Rank 2", "Rank 4"], 2, 2),
        ("any_optimizer", ["AdamW", "Rank 4", "Rank 8"], 1, 1),
    ],
)
def test_the_comparisons(
    name: str, methods: list[str], tasks: int, seeds: int, tmp_path: Path
) -> None:
    short = ["--workers", "2", "--epochs", "1", "--seeds", str(seeds), "--output", str(tmp_path)]
    short += ["--batch-size", "256"]  # of few steps
    # One of them starts its workers itself.
    done = run(f"examples/{name}.py", *short, workers=1 if name == "any_optimizer" else 2)
    assert done.returncode == 0, done.stderr
    for words in ("Algorithm", *methods, "Data sent per epoch", "Time per batch"):
        assert words in done.stdout
    assert ("±" in done.stdout) == (seeds > 1)
    runs = results_of(tmp_path, name)["runs"]
    assert len(runs) == tasks
    for of_task in runs.values():
        assert list(of_task) == methods
        assert all(len(histories) == seeds for histories in of_task.values())
        sent = [of_task[method][0]["bytes_per_epoch"] for method in methods]
        assert [*sent[1:], sent[0]] == sorted(set(sent))  # the baseline sends the most
        steps = {tuple(history["steps"]) for each in of_task.values() for history in each}
        assert len(steps) == 1  # equal steps for all
