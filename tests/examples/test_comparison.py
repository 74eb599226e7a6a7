"""What a comparison shows, and when; and what `make demo` runs."""

import argparse
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.table import Table
from torch import nn

from examples.comparison import Comparison, Subject, argument_parser
from examples.distributed import Workers
from examples.history import History
from examples.optimizers import Optimizer
from examples.settings import Settings

ROOT = Path(__file__).parents[2]


class Recorded(Comparison):
    """Says what it trains, and trains nothing."""

    def _train(
        self, subject: Subject, method: str, seed: int, workers: Workers
    ) -> tuple[History, str]:
        print(f"{subject.title}: {method}, seed {seed}")
        return History(quality=[1.0]), "accuracy"


def unused(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is trained")


def method(
    model: nn.Module, settings: Settings, seed: int, workers: Workers
) -> tuple[nn.Module, Optimizer]:
    return unused()


def a_table(title: str, quality: str, runs: Mapping[str, Sequence[History]]) -> Table:
    table = Table(title=f"the {quality} of {title}", title_justify="left")
    table.add_column("seeds", min_width=40)
    table.add_row(", ".join(f"{name}: {len(each)}" for name, each in runs.items()))
    return table


@pytest.mark.parametrize("markdown", [False, True])
@pytest.mark.parametrize("worker", [0, 1])
def test_a_table_is_printed_before_the_next_task_is_trained(
    worker: int, markdown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(epochs=1, batch_size=1, lr=0.1)
    comparison = Recorded(
        name="compared",
        subjects=[Subject(title, settings, unused) for title in ("digits", "text")],
        methods={"SGD": method, "Rank 1": method},
        table=a_table,
        plot=lambda path, tasks: path.write_text(repr(list(tasks))),
    )
    words = ["--seeds", "2", "--output", str(tmp_path), *(["--markdown"] if markdown else [])]
    arguments: argparse.Namespace = argument_parser(None).parse_args(words)
    comparison._run(Workers(worker, 2, torch.device("cpu")), arguments)
    printed = capsys.readouterr().out
    expected = []
    for title in ("digits", "text"):
        expected += [
            f"{title}: {each}, seed {seed}" for seed in (1, 2) for each in ("SGD", "Rank 1")
        ]
        expected += [f"the accuracy of {title}"] if worker == 0 else []
    places = [printed.index(line) for line in expected]
    assert places == sorted(places)
    assert printed.count("SGD: 2, Rank 1: 2") == (2 if worker == 0 else 0)
    assert len(list(tmp_path.iterdir())) == (2 if worker == 0 else 0)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_demo_takes_one_seed_and_names_the_command_for_three() -> None:
    def commands(target: str) -> list[str]:
        """Those that `make` would run, without running any."""
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    [demo] = [line for line in commands("demo") if "compare_ranks" in line]
    [full] = [line for line in commands("demo-full") if "compare_ranks" in line]
    assert "--seeds 1" in demo and "--seeds" not in full  # the default is three
    assert argument_parser(None).parse_args([]).seeds == 3
    assert any("make demo-full" in line for line in commands("demo") if line != demo)
