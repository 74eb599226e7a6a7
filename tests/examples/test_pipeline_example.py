"""examples/pipeline.py: stages in processes, the bytes of its table, and that it learns."""

import json
from pathlib import Path

import pytest

from tests.launcher import run_programs

pytestmark = pytest.mark.xdist_group("processes")


def test_two_stages_learn_the_digits_and_send_what_the_links_announce(tmp_path: Path) -> None:
    short = ("--tasks", "digits", "--epochs", "4", "--samples", "192")
    done = run_programs(("examples/pipeline.py", *short, "--output", str(tmp_path)), 2)
    assert done.returncode == 0, done.stderr
    assert "4 bits / 8 bits" in done.stdout
    (runs,) = json.loads((tmp_path / "pipeline-2.json").read_text()).values()
    assert (tmp_path / "pipeline-2.png").stat().st_size > 10_000
    numbers = 192 * 32 * 4 * 4  # of the activations between the two stages
    found = {method: (own["forwards"], own["backwards"]) for method, (own,) in runs.items()}
    assert found["No compression"] == (4 * numbers, 4 * numbers)
    # Each sample has two bounds, or a largest magnitude, besides its codes.
    assert found["4 bits / 8 bits"] == (numbers / 2 + 192 * 8, numbers + 192 * 4)
    assert found["Top 10 % / Top 10 %"] == (192 * 51 * 8, 192 * 51 * 8)
    assert runs["No compression"][0]["on"] > 20  # guessing gives 10
