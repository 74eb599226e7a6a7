"""The documentation's training script runs as its page says.

Everything else on the pages is checked by "make docs": each example runs, each public name is
described.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


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
