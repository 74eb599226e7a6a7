"""The parts of the benchmarks that measure nothing: statistics, gradients, predictions, limits."""

import doctest
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks import (
    candidates,
    checks,
    local,
    memory,
    namespaces,
    network,
    results,
    timing,
    workloads,
)
from benchmarks.candidates import Bench, Candidate, compared
from benchmarks.growth import LARGE, SMALL, predictions
from benchmarks.memory_budget import sessions
from benchmarks.timing import Quartiles, Runner, compare, measure, orders
from benchmarks.workloads import (
    FixedGradients,
    made_gradients,
    matrices_of,
    message_floats,
    shapes_of,
)
from efsgd import PowerSGDOptimizer

SHAPES = [(6, 5), (6,), (4, 2, 3, 3)]


@pytest.mark.parametrize(
    "module", [memory, namespaces, results, timing, workloads], ids=lambda m: m.__name__
)
def test_examples_in_docstrings(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.failed == 0 < found.attempted


def test_medians_and_quartiles() -> None:
    assert Quartiles.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Quartiles(2.0, 3.0, 4.0)
    assert Quartiles.of([7.0]) == Quartiles(7.0, 7.0, 7.0)
    assert Quartiles.of([1.0, 3.0]).scaled(2.0).median == 4.0


def test_ratios_are_taken_within_a_round_and_above_the_floor() -> None:
    samples = {"floor": [1.0, 10.0, 1.0], "sgd": [5.0, 50.0, 7.0], "ours": [3.0, 30.0, 3.0]}
    rows = {row.name: row for row in compare(samples, floor="floor", baseline="sgd")}
    assert rows.keys() == {"sgd", "ours"}
    assert rows["ours"].whole.median == 3.0
    assert rows["ours"].net.median == 2.0  # of 2, 20 and 2
    # 4/2, 40/20 and 6/2: the second round, in which everything took ten times as long, is like
    # the first.
    assert rows["ours"].gain == Quartiles(2.0, 2.0, 2.5)
    assert rows["ours"].cost.median == 0.5
    assert rows["sgd"].gain.median == 1.0


def test_every_round_has_another_order_and_all_workers_the_same() -> None:
    names = list("abcdefgh")
    found = list(orders(names, 20, seed=3))
    assert found == list(orders(names, 20, seed=3))
    assert found != list(orders(names, 20, seed=4))
    assert all(sorted(order) == names for order in found)
    assert len(set(map(tuple, found))) > 15


def test_each_runner_is_prepared_and_stepped_once_per_round() -> None:
    calls: list[str] = []

    def runner(name: str) -> Runner:
        return Runner(lambda: calls.append(f"step {name}"), lambda: calls.append(f"prepare {name}"))

    def clock(step: Any) -> float:
        step()
        return float(len(calls))

    samples = measure({n: runner(n) for n in "ab"}, rounds=3, warm_up=2, clock=clock)
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}
    assert len(calls) == 2 * 2 * 5
    for prepared, stepped in zip(calls[::2], calls[1::2], strict=True):
        assert prepared.split() == ["prepare", stepped.split()[1]]


def test_predictions_beside_measurements() -> None:
    message = Candidate("all-reduce", nbytes=(1024, 4_000_000))
    samples = {SMALL.name: [0.002], LARGE.name: [0.082], message.name: [0.035]}
    sizes = {"a model": list(message.nbytes)}
    (found,) = predictions({"workers": 4, "messages": sizes, "samples": samples})
    # Halves of what two of the same size took.
    assert found.predicted == pytest.approx(0.001 + 0.041)
    assert found.deviation == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("workload", "parameters", "tensors"),
    [("resnet18", 11_173_962, 62), ("lstm", 28_949_319, 14), ("gpt2", 124_439_808, 148)],
)
def test_sizes_of_the_models(workload: str, parameters: int, tensors: int) -> None:
    shapes = shapes_of(workload)
    assert (sum(map(math.prod, shapes)), len(shapes)) == (parameters, tensors)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_messages_are_those_that_the_optimizer_sends(rank: int) -> None:
    parameters = [torch.nn.Parameter(gradient) for gradient in made_gradients(SHAPES)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = PowerSGDOptimizer(parameters, lr=0.1, rank=rank)
    optimizer.step()
    first, second = message_floats(SHAPES, rank)
    words = optimizer.communication_stats()["bytes_sent"] / 4 - first - second
    assert 0 < words < 16  # the control words; their number has nothing to do with the rank
    assert second == sum(m * min(n, m, rank) for n, m in matrices_of(SHAPES, rank))


def test_autograd_takes_over_the_gradients_that_are_handed_to_it() -> None:
    gradients = made_gradients(SHAPES, worker=1)
    module = FixedGradients(gradients)
    for _ in range(3):
        module.prepare()
        places = [tensor.data_ptr() for tensor in module.ready]
        module().backward()
        for weight, gradient, place in zip(module.weights, gradients, places, strict=True):
            assert weight.grad is not None
            assert torch.equal(weight.grad, gradient)
            assert weight.grad.data_ptr() == place  # not copied
            weight.grad.mul_(2)  # as optimizers do; the given ones stay as they are
    assert not torch.equal(gradients[0], made_gradients(SHAPES, worker=2)[0])


def test_a_module_that_accumulates_adds_to_what_is_there() -> None:
    gradients = made_gradients(SHAPES)
    module = FixedGradients(gradients, accumulates=True)
    for _ in range(2):
        module.prepare()
        module().backward()
    for weight, gradient in zip(module.weights, gradients, strict=True):
        assert weight.grad is not None
        assert torch.equal(weight.grad, 2 * gradient)


def test_candidates_of_one_worker_step() -> None:
    bench = Bench(made_gradients(SHAPES))
    kinds = ["floor", "copy", "sgd-foreach", "sgd-loop", "sgd-fused"]
    listed = [Candidate(kind) for kind in kinds] + [Candidate("orthogonalization", 2)]
    for candidate in listed + compared([1, 2], ["efsgd"], compiled=False, epfml=False):
        runner = bench.runner(candidate)
        runner.prepare()
        runner.step()
    assert all(o.communication_stats()["steps"] == 1 for o in bench.optimizers.values())
    assert len(bench.optimizers) == 4


def test_a_check_reads_all_that_workers_have_in_common(capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(made_gradients(SHAPES))
    runner = bench.runner(checks.STEP)
    runner.prepare()
    runner.step()
    [optimizer] = bench.optimizers.values()
    assert checks.check(optimizer) == 3 * 3  # x, m, and whether m has begun; here is no Q
    checks.report("resnet18", {"floor": [1.0], checks.STEP.name: [3.0], checks.CHECK: [1.0]})
    assert "0.5×" in capsys.readouterr().out


def test_names_are_unique_and_survive_json() -> None:
    listed = [*local.ALWAYS, *network.link_probes("1gbit"), SMALL, LARGE, network.BASELINE]
    listed += compared([1, 2], None, compiled=True, epfml=True)
    assert len({candidate.name for candidate in listed}) == len(listed)
    for candidate in listed:
        assert Candidate.from_json(json.loads(json.dumps(asdict(candidate)))) == candidate


def test_what_is_left_out_is_said() -> None:
    assert not [c for c in compared([1], None, compiled=False, epfml=False) if c.kind == "epfml"]
    assert any("--epfml" in reason for reason in candidates.left_out(compiled=False, epfml=False))
    assert candidates.left_out(compiled=False, epfml=True) == []


def test_a_directory_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="git clone"):
        candidates.use_epfml(tmp_path)


def test_sessions_hold_what_fits_in_memory() -> None:
    listed = compared([1, 2], None, compiled=False, epfml=True)
    always = [network.FLOOR, network.BASELINE]

    def split(memory_bytes: float) -> list[list[Candidate]]:
        return list(sessions(listed, 1000, memory_bytes, always))

    assert split(math.inf) == [[*always, *listed]]
    small = split(0)
    assert [session[2:] for session in small] == [[candidate] for candidate in listed]
    middle = split(20_000)
    assert 1 < len(middle) < len(listed)
    assert [c for session in middle for c in session if c not in always] == listed


def test_peaks_of_allocations() -> None:
    assert memory.peak_of([]) == (0, 0)
    assert memory.peak_of([10, -10, 6, 6, -3, -12]) == (12, -3)


def test_the_command_that_is_shown_has_no_paths() -> None:
    given = ["--rate", "1gbit", "--epfml", "/somewhere/else", "--output", "docs/x.json"]
    shown = results.command_of("network", given)
    assert shown == "python -m benchmarks.network --rate 1gbit --epfml DIR"


def test_rates() -> None:
    assert namespaces.bytes_per_second("1gbit") == 125_000_000
    assert namespaces.bytes_per_second("unlimited") == math.inf
    assert namespaces.checked_rate("100mbit") == "100mbit"
    for wrong in ("fast", "1gb", "0mbit", "1 gbit"):
        with pytest.raises(ValueError, match="give one like"):
            namespaces.checked_rate(wrong)


@pytest.mark.parametrize(
    ("users", "path", "message"),
    [(1000, "/usr/sbin:/sbin:/usr/bin:/bin", "need root"), (0, "/nowhere", "iproute2")],
)
def test_without_what_namespaces_need_there_is_one_line(
    users: int,
    path: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: users)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(sys, "argv", ["network.py", "--output", "/nowhere/network.json"])
    assert network.main() == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.err.count("\n"), printed.out) == (1, "")
