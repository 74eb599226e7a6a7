"""Real processes over gloo: the same as in lockstep, and clear errors in place of hangs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from efsgd.checkpoint import consolidation
from efsgd.testing import lockstep, step_together
from tests.launcher import launch, run_programs
from tests.wire import process_worker as script

# One process of pytest runs them all: they share launches, and several would crowd the cores.
pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 workers", "4 workers"])
def agreed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What the workers report of the task "agree"."""
    return launch(script.__file__, request.param, tmp_path_factory.mktemp("agree"), "agree")


def test_workers_are_bitwise_equal_after_50_steps(agreed: list[dict[str, Any]]) -> None:
    for kind in ("parameters", "momentum_buffer", "momentum_started", "q"):
        assert all(worker["trained"][kind] == agreed[0]["trained"][kind] for worker in agreed)
    errors = {str(worker["trained"]["error"]) for worker in agreed}
    assert len(errors) == len(agreed)
    assert all(worker["stats"]["steps"] == 50 for worker in agreed)
    assert all(worker["stats"]["collectives"] == 2 for worker in agreed)


def test_processes_compute_what_lockstep_computes(agreed: list[dict[str, Any]]) -> None:
    world_size = len(agreed)
    optimizers = [script.make(script.start()) for _ in range(world_size)]
    for step in range(50):
        for worker, optimizer in enumerate(optimizers):
            script.set_gradients(optimizer, step, worker)
        step_together(optimizers)
        if step == 4:
            for index, values in enumerate(agreed[0]["values"]):
                expected = optimizers[0].param_groups[0]["params"][index].detach().flatten()
                # gloo may add in another order: float32 rounding (6e-8), multiplied by five steps
                # of error feedback on noise, which is as ill-conditioned as gradients can be.
                largest = (torch.tensor(values) - expected).abs().max()
                assert largest <= (0 if world_size == 2 else 1e-4)
    if world_size == 2:  # a sum of two is the same in either order: all 50 steps, to the bit
        assert agreed[0]["trained"] == script.fingerprint(optimizers[0])
        assert agreed[1]["trained"] == script.fingerprint(optimizers[1])
        saved = lockstep([consolidation(optimizer) for optimizer in optimizers]).results[0]
        errors = [state["error"] for state in saved["state"].values() if "error" in state]
        assert agreed[0]["mean_errors"] == list(map(script.checksum, errors))
    assert all(worker["mean_errors"] == agreed[0]["mean_errors"] for worker in agreed)


def test_a_worker_observes_its_own_messages(agreed: list[dict[str, Any]]) -> None:
    for worker, report in enumerate(agreed):
        sent = report["stats"]["bytes_sent"]
        assert report["observed"] == [[20, worker, True, sent], [21, worker, True, sent]]


def test_several_buckets_never_stand_still_and_compute_what_lockstep_computes(
    agreed: list[dict[str, Any]],
) -> None:
    """Over 200 steps, in which collectives of all buckets are in flight at once."""
    for kind in ("parameters", "momentum_buffer", "q"):
        assert all(worker["in_buckets"][kind] == agreed[0]["in_buckets"][kind] for worker in agreed)
    assert all(worker["collectives_in_buckets"] == 2 * 3 for worker in agreed)
    if len(agreed) == 2:  # a sum of two is the same in either order
        optimizers = [script.make(script.start(), bucket_bytes=1000) for _ in agreed]
        for step in range(200):
            for worker, optimizer in enumerate(optimizers):
                script.set_gradients(optimizer, step, worker)
            step_together(optimizers)
        for worker, optimizer in zip(agreed, optimizers, strict=True):
            assert worker["in_buckets"] == script.fingerprint(optimizer)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other_shape", ["parameter 4", "[40, 30]", "[40, 31]"]),
        ("fewer_parameters", ["parameter 4", "nothing"]),
        ("other_rank", ["rank=2", "rank=3"]),
        ("other_values", ["parameter 2 differs", "broadcast_parameters()"]),
    ],
)
def test_workers_that_disagree_all_say_so(
    agreed: list[dict[str, Any]], case: str, words: list[str]
) -> None:
    reports = [worker[case] for worker in agreed]
    assert {report["type"] for report in reports} == {"WorkerMismatchError"}
    assert len({report["text"] for report in reports}) == 1
    last = len(agreed) - 1
    assert all(word in reports[0]["text"] for word in [*words, f"worker {last}"])
    assert all(report["seconds"] < 10 for report in reports)  # a hang would take 30


def test_nothing_has_changed_and_a_broadcast_is_the_remedy(agreed: list[dict[str, Any]]) -> None:
    assert all(worker["untouched"] for worker in agreed)
    assert all(worker["after_broadcast"] == agreed[0]["after_broadcast"] for worker in agreed)


@pytest.mark.parametrize("agreed", [4], ids=["4 workers"], indirect=True)
def test_subgroups_are_workers_of_their_own(agreed: list[dict[str, Any]]) -> None:
    first, second, third, fourth = (worker["subgroup"] for worker in agreed)
    assert first == second != third == fourth
    assert all("does not contain this process" in worker["outsider"]["text"] for worker in agreed)


def test_a_group_ends_with_destroy_process_group(agreed: list[dict[str, Any]]) -> None:
    # Threads that are left end somewhere in the destructors at exit, and may abort the process.
    if not script.THREADS.is_dir():
        pytest.skip("the names of threads are known on Linux only")
    if not any(worker["threads"]["before"] for worker in agreed):
        pytest.skip("this torch's threads have no names of their own")
    assert all(worker["threads"]["before"] for worker in agreed)
    assert all(worker["threads"]["after"] == [] for worker in agreed)


def test_what_is_made_and_loaded_before_the_group_trains_like_what_is_made_after_it(
    tmp_path: Path,
) -> None:
    workers = launch(script.__file__, 2, tmp_path, "early")
    for worker in workers:
        assert worker["early"] == worker["late"]
        assert worker["early"]["parameters"] != worker["start"]["parameters"]
        assert worker["early"]["parameters"] == workers[0]["early"]["parameters"]
        assert worker["early"]["error"] != worker["start"]["error"]
    assert workers[0]["early"]["error"] != workers[1]["early"]["error"]


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_worker_that_dies_leaves_the_others_intact(world_size: int, tmp_path: Path) -> None:
    # torchrun would end the others before they can say how they are.
    command = [script.__file__, "die", str(tmp_path)]
    codes = run_programs(command, world_size, ends_others=False).returncodes
    assert codes == [3 if rank == 1 else 0 for rank in range(world_size)]
    found = {int(file.stem): json.loads(file.read_text()) for file in tmp_path.glob("*.json")}
    assert sorted(found) == [rank for rank in range(world_size) if rank != 1]
    for rank, report in found.items():
        assert report["error"]["type"] == "CollectiveError"
        for words in ("Step 3 was abandoned", f"on worker {rank} of {world_size}", "Alg. 1"):
            assert words in report["error"]["text"]
        assert report["error"]["seconds"] < 35  # the time-out of the group, at most
        assert report["untouched"]["same"]


def test_a_call_that_one_worker_makes_is_named_long_before_the_time_out(tmp_path: Path) -> None:
    first, second = launch(script.__file__, 2, tmp_path, "alone")
    for name, report in first.items():
        for own, other in ((report, second[name]), (second[name], report)):
            assert own["type"] == "CollectiveError", own
            assert own["seconds"] < 15, own  # of 30 until the group's time-out
            assert own["untouched"]
            assert name in own["text"] and "step()" in own["text"], own
            assert "Every worker of the group must call" in own["text"]
            assert other["type"] == own["type"]
