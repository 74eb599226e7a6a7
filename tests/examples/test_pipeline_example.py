"""examples/pipeline.py: stages in processes, the bytes of its tables, and that it learns."""

import json
from pathlib import Path

import pytest

from tests.examples.test_example_data import write_cifar10
from tests.launcher import run_programs

pytestmark = pytest.mark.xdist_group("processes")


def test_two_stages_learn_the_digits_and_send_what_the_links_announce(tmp_path: Path) -> None:
    short = ("--tasks", "digits", "--epochs", "4", "--samples", "192", "--resume")
    # One training of the same settings is done already, and is not done again; another is done.
    settings = {"method": "4 bits / 4 bits, min-max", "epochs": 4, "batch_size": 64, "samples": 192}
    known = {"on": 12.0, "off": 34.0, "forwards": 5.0, "backwards": 6.0, "seconds": 7.0}
    folder = tmp_path / "pipeline-trainings"
    folder.mkdir()
    done_before = {"settings": settings, "found": known}
    (folder / "digits-2-1-4-bits-4-bits-min-max.json").write_text(json.dumps(done_before))
    done_before["settings"] = {"method": "No compression", "epochs": 3}
    (folder / "digits-2-1-no-compression.json").write_text(json.dumps(done_before))

    done = run_programs(("examples/pipeline.py", *short, "--output", str(tmp_path)), 2)
    assert done.returncode == 0, done.stderr
    assert "4 bits / 8 bits" in done.stdout
    (runs,) = json.loads((tmp_path / "pipeline-2.json").read_text()).values()
    assert runs["4 bits / 4 bits, min-max"] == [known]
    assert len(list(folder.iterdir())) == len(runs) == 4
    assert (tmp_path / "pipeline-2.png").stat().st_size > 10_000
    numbers = 192 * 32 * 4 * 4  # of the activations between the two stages
    found = {method: (own["forwards"], own["backwards"]) for method, (own,) in runs.items()}
    assert found["No compression"] == (4 * numbers, 4 * numbers)
    # Each sample has two bounds, or a largest magnitude, besides its codes.
    assert found["4 bits / 8 bits"] == (numbers / 2 + 192 * 8, numbers + 192 * 4)
    assert found["Top 10 % / Top 10 %"] == (192 * 51 * 8, 192 * 51 * 8)
    assert runs["No compression"][0]["on"] > 20  # guessing gives 10


def test_the_papers_resnet18_in_four_stages_on_files(tmp_path: Path) -> None:
    write_cifar10(tmp_path, records=2)
    short = ("--epochs", "1", "--batch-size", "4", "--samples", "8")
    methods = ("--methods", "No compression", "4 bits / 8 bits")
    files = ("--data", str(tmp_path), "--output", str(tmp_path))
    done = run_programs(("examples/pipeline.py", *files, *short, *methods), 4)
    assert done.returncode == 0, done.stderr
    assert "ResNet18 on CIFAR-10, 4 stages" in done.stdout
    (runs,) = json.loads((tmp_path / "pipeline-4.json").read_text()).values()
    found = {method: (own["forwards"], own["backwards"]) for method, (own,) in runs.items()}
    numbers = 8 * (64 * 32 * 32 + 128 * 16 * 16 + 256 * 8 * 8)  # as in the paper
    assert found["No compression"] == (4 * numbers, 4 * numbers) == (8 * 458_752, 8 * 458_752)
    assert found["4 bits / 8 bits"] == (8 * 57_368, numbers + 3 * 8 * 4)
