"""Whole trainings: what is trained runs, and times to a quality are what the figures say."""

import doctest
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks import time_to_quality, training
from benchmarks.time_to_quality import seconds_to, shared_quality, table
from benchmarks.training_worker import METHODS, run


@pytest.fixture
def one_worker() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


OURS = [name for name in METHODS if not name.startswith("epfml")]
SOME = [name for name in OURS if "rank 1" not in name and name not in ("DDP", "rank 2")]


@pytest.mark.usefixtures("one_worker")
@pytest.mark.parametrize("method", SOME)
def test_every_method_trains(method: str) -> None:
    job = {"task": "digits", "method": method, "seed": 1, "epochs": 1, "lr": 0.02}
    found = run(job | {"cifar10": None, "epfml": None})
    assert found["is"] == "test accuracy (%)"
    before, after = found["quality"]
    assert after > before + 30
    assert found["seconds"][0] == 0.0 < found["seconds"][1]
    assert found["bytes"][0] == 0 < found["bytes"][1]


def made(quality: list[float | None], *, falling: bool) -> dict[str, Any]:
    kind = "test perplexity" if falling else "test accuracy (%)"
    return {
        "is": kind, "quality": quality, "seconds": [0.0, 2.0, 4.0], "bytes": [0, 10, 2**20],
    }  # fmt: skip


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(time_to_quality).failed == 0


@pytest.mark.parametrize("falling", [True, False])
def test_time_to_a_quality_is_read_from_straight_lines_between_tests(falling: bool) -> None:
    sign = -1 if falling else 1
    run = made([50 - 40 * sign, 50.0, 50 + 10 * sign], falling=falling)
    assert seconds_to(run, 50 - 20 * sign) == 1.0
    assert seconds_to(run, 50 + 10 * sign) == 4.0
    assert seconds_to(run, 50 + 10.1 * sign) is None
    assert seconds_to({**run, "quality": [None, 60.0, 60.0]}, 60.0) == 2.0


def test_a_table_compares_times_to_what_all_have_reached() -> None:
    runs = {
        "DDP": [made([90.0, 40.0, 30.0], falling=True)] * 2,
        "fast": [made([90.0, 35.0, 32.0], falling=True) | {"seconds": [0.0, 0.5, 1.0]}] * 2,
        "diverges": [made([90.0, None, 20.0], falling=True), made([90.0, 80, 36], falling=True)],
    }
    assert shared_quality(runs) == 36.0
    (_, *first), (_, *second), (_, *third) = table(runs, 36.0, baseline="DDP")
    assert first == ["30.00 ± 0.00", "1.0", "4", "2.8", "1.00×"]
    assert second == ["32.00 ± 0.00", "1.0", "1", "0.5", f"{2.8 / (0.5 * 54 / 55):.2f}×"]
    assert third[3] == "4.0"
    runs["diverges"][1] = made([90.0, 80, None], falling=True)
    *_, (_, *third) = table(runs, 36.0, baseline="DDP")
    assert third[3:] == ["never", ""]


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    runs = {"DDP": [made([90.0, 40.0, 30.0], falling=True)]}
    time_to_quality.plot(tmp_path / "a.png", "lstm", runs, 40.0)
    assert os.path.getsize(tmp_path / "a.png") > 10_000


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--task", "cifar10"], "--cifar10 DIR"), (["--methods", "epfml, rank 4"], "--epfml DIR")],
)
def test_what_is_missing_is_said(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        training.parse_arguments(words)
    assert said in capsys.readouterr().err


def test_epfml_is_compared_where_there_is_a_clone() -> None:
    assert training.parse_arguments([]).methods == OURS
    assert training.parse_arguments(["--epfml", "clone"]).methods == list(METHODS)
