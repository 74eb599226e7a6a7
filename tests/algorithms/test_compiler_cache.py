"""Programs with `compile=True` from start to end: with a warm cache, and without a compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.algorithms.test_compiled import _compiler  # noqa: F401 (skips what needs a compiler)

PROGRAM = """
import torch
from torch._dynamo.utils import counters
from efsgd import PowerSGDOptimizer
x = torch.zeros(512, 640, requires_grad=True)
optimizer = PowerSGDOptimizer([x], lr=0.1, momentum=0.9, rank=2, compile=True)
x.grad = torch.ones_like(x)
optimizer.step()
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


def run_program(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM]
    given = {**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=150)


@pytest.mark.slow
def test_a_warm_cache_survives_the_process(tmp_path: Path) -> None:
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    cold, warm = run_program(cache), run_program(cache)
    assert cold.returncode == 0, cold.stderr
    assert int(cold.stdout.split()[1]) >= 2  # has_compiler's question, and the update
    assert warm.stdout.split() == [cold.stdout.split()[1], "0"]


@pytest.mark.without_compiler
def test_without_a_compiler_one_warning_is_given_and_steps_go_on(tmp_path: Path) -> None:
    none = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": "/nowhere"}
    done = run_program(none)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("compile=True cannot do what it should") == 1
    assert "g++" in done.stderr
