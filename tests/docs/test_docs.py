"""What the documentation says of files is true: its training script runs, its tests exist.

The rest is checked by "make docs": every example runs, and every public name is described.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_training_script_of_the_quickstart_learns_on_two_workers() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", "docs/train.py"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss on worker 0: ([\d.]+)", done.stdout)]
    assert len(losses) == 6 and losses[-1] < 0.5 * losses[0], done.stdout
    assert "2 collectives per step" in done.stdout


def test_files_named_in_the_documentation_exist() -> None:
    for page in sorted((ROOT / "docs").glob("*.md")):
        for name in re.findall(r"`((?:docs|efsgd|examples|tests)/[\w/]+\.\w+)`", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name} names {name}"
