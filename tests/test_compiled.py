"""`compile=True` computes the same to rounding, compiles once, and does without a compiler."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from efsgd import PowerSGDOptimizer, WorkerMismatchError, fusion
from efsgd.testing import step_together
from tests.simulation import difference, make_workers, parameters_of, step_with
from tests.strategies import gaussian

# Large enough to be fused: see Fusion.MIN_FLOATS. The second has the form of a convolution.
SHAPES = [(512, 640), (256, 128, 3, 3), (640,), (24, 20)]
FORMS: list[dict[str, Any]] = [
    {"momentum_form": "paper", "momentum": 0.9, "weight_decay": 0.01},
    {"momentum_form": "paper"},
    {"momentum_form": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"momentum_form": "sgd", "momentum": 0.9, "dampening": 0.3, "maximize": True},
]


@pytest.fixture(autouse=True)
def _quiet_compiler() -> Any:
    with warnings.catch_warnings():  # torch's own compiler uses what torch has deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def start(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [gaussian(shape, 1, i).to(dtype) for i, shape in enumerate(SHAPES)]


def gradients(step: int, worker: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [gaussian(shape, 2, step, worker, i).to(dtype) for i, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_results_are_those_of_eager_steps_to_rounding(options: dict[str, Any]) -> None:
    compiled = make_workers(start(), 2, lr=0.1, rank=2, compile=True, **options)
    eager = make_workers(start(), 2, lr=0.1, rank=2, **options)
    for step in range(4):
        given = [gradients(step, worker) for worker in range(2)]
        step_with(compiled, given)
        step_with(eager, given)
    for ours, theirs in zip(compiled, eager, strict=True):
        for a, b in zip(parameters_of(ours), parameters_of(theirs), strict=True):
            assert difference(a, b) < 2e-6  # float32: a few units of 6e-8 in each of 4 steps
            for name in ("error", "q", "momentum_buffer"):
                if name in ours.state[a]:
                    assert difference(ours.state[a][name], theirs.state[b][name]) < 1e-5
    for a, b in zip(*map(parameters_of, compiled), strict=True):
        assert torch.equal(a, b)  # workers never drift


def test_float64_and_bfloat16_parameters_and_strides_are_served() -> None:
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.bfloat16, 2e-2)):
        ends = []
        for compile in (True, False):
            ps = start(dtype)
            ps[0] = ps[0].T.contiguous().T
            ps[1] = ps[1].to(memory_format=torch.channels_last)
            workers = make_workers(ps, 1, lr=0.1, momentum=0.9, rank=2, compile=compile)
            for step in range(3):
                step_with(workers, [gradients(step, 0, dtype)])
            ends.append(parameters_of(workers[0]))
        for a, b in zip(*ends, strict=True):
            # bfloat16 has 8 bits; where sums round differently once, a unit of 2^-8 remains.
            assert difference(a.double(), b.double()) < tolerance


def test_new_numbers_compile_nothing() -> None:
    [worker] = make_workers(start(), 1, lr=0.1, momentum=0.9, weight_decay=0.1, compile=True)
    step_with([worker], [gradients(0, 0)])
    counters.clear()
    for step in range(1, 5):
        group = worker.param_groups[0]
        group["lr"], group["momentum"], group["weight_decay"] = 0.1 / step, 0.9 / step, 0.1 / step
        step_with([worker], [gradients(step, 0)])
    assert not counters["stats"]["unique_graphs"] and not counters["frames"]["total"]


def test_missing_gradients_compile_nothing_and_leave_their_parameters_alone() -> None:
    [worker] = make_workers(start(), 1, lr=0.1, momentum=0.9, compile=True)
    step_with([worker], [gradients(0, 0)])
    counters.clear()
    before = [p.detach().clone() for p in parameters_of(worker)]
    step_with([worker], [[None, *gradients(1, 0)[1:]]])
    assert torch.equal(parameters_of(worker)[0], before[0])
    assert not torch.equal(parameters_of(worker)[1], before[1])
    assert not counters["frames"]["total"]


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
    given = {**os.environ, **environment, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=150)


def test_a_warm_cache_survives_the_process(tmp_path: Path) -> None:
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    cold, warm = run_program(cache), run_program(cache)
    assert cold.returncode == 0, cold.stderr
    assert int(cold.stdout.split()[1]) > 0
    assert warm.stdout.split()[1] == "0" and int(warm.stdout.split()[0]) > 0


def test_without_a_compiler_one_warning_is_given_and_steps_go_on(tmp_path: Path) -> None:
    none = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": "/nowhere"}
    done = run_program(none)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("compile=True has no effect") == 1
    assert "g++" in done.stderr


def test_a_compiler_that_fails_later_is_given_up_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        def call(*_: Any) -> None:
            raise RuntimeError("no space left on device")

        return call

    monkeypatch.setattr(fusion, "_compile", fails)
    [ours] = make_workers(start(), 1, lr=0.1, momentum=0.9, compile=True)
    [theirs] = make_workers(start(), 1, lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning, match="no space left on device"):
        step_with([ours], [gradients(0, 0)])
    step_with([ours], [gradients(1, 0)])
    for step in range(2):
        step_with([theirs], [gradients(step, 0)])
    for a, b in zip(parameters_of(ours), parameters_of(theirs), strict=True):
        assert torch.equal(a, b)


def test_workers_of_which_one_has_no_compiler_refuse_to_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = make_workers(start(), 2, lr=0.1, compile=True)
    answers = iter([True, False])
    monkeypatch.setattr("efsgd.compressors.powersgd.has_compiler", lambda _: next(answers))
    for worker in workers:
        for p, g in zip(parameters_of(worker), gradients(0, 0), strict=True):
            p.grad = g
    with pytest.raises(
        WorkerMismatchError, match=r"worker 0: .* \(compiled\); worker 1: .* \(eager\)"
    ):
        step_together(workers)


def test_invalid_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Invalid compile: 'yes'\. Must be a bool"):
        PowerSGDOptimizer([torch.zeros(3, requires_grad=True)], compile="yes")
