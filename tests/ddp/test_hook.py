"""The communication hook in real processes: bits, transactions, and what becomes of errors."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from efsgd import GradientAverager
from efsgd.ddp import CompressionState
from efsgd.ddp.backward import Pass, Worker
from efsgd.engine.buckets import divide
from efsgd.engine.parameters import list_parameters
from tests.ddp import hook_worker as script
from tests.launcher import launch, run_programs

pytestmark = pytest.mark.xdist_group("processes")

Reports = list[dict[str, Any]]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What two workers report of all tasks."""
    return launch(script.__file__, 2, tmp_path_factory.mktemp("hook"))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What three workers report of some."""
    return launch(script.__file__, 3, tmp_path_factory.mktemp("hook3"), "long", "rejected")


@pytest.mark.parametrize("name", script.VARIANTS)
def test_gradients_and_state_are_bitwise_those_of_the_averager(workers: Reports, name: str) -> None:
    for report in workers:
        hooked, averaged = report["variants"][name]
        assert hooked == averaged
        assert hooked["parameters"] == workers[0]["variants"][name][0]["parameters"]
    hooked, others = (report["variants"][name][0] for report in workers)
    assert hooked["error"] != others["error"] or name == "later"


def test_what_nobody_uses_keeps_its_error(workers: Reports) -> None:
    """DDP would drop what is sent of it."""
    for report in workers:
        assert report["kept"]["after"] == report["kept"]["before"]
        assert any(map(any, report["kept"]["before"][0]))


@pytest.mark.parametrize("count", ["workers", "three"])
def test_many_steps_never_stand_still(count: str, request: pytest.FixtureRequest) -> None:
    reports: Reports = request.getfixturevalue(count)
    for report in reports:
        hooked, averaged = report["long"]["fingerprints"]
        assert hooked == averaged
        assert hooked["parameters"] == reports[0]["long"]["fingerprints"][0]["parameters"]
        of_hook, of_averager = report["long"]["stats"]
        assert of_hook == of_averager
        assert of_hook["collectives"] == 2 * 3


def test_a_scaler_skips_on_all_workers_and_errors_are_in_units_of_the_loss(
    workers: Reports,
) -> None:
    for report in workers:
        hooked, averaged = report["scaled"]["found"]
        assert hooked == averaged
        assert hooked[1] == [step != 3 for step in range(script.STEPS)]


@pytest.mark.parametrize("count", ["workers", "three"])
def test_a_gradient_that_is_not_finite_changes_nothing_anywhere(
    count: str, request: pytest.FixtureRequest
) -> None:
    for report in request.getfixturevalue(count):
        found = report["rejected"]
        kind, text = found["raise"]
        assert kind == "NonFiniteGradientError"
        assert "on worker 1 the gradient of parameter" in text
        assert found["unchanged"]
        hooked, twin = found["goes on"]
        assert hooked == twin
        assert found["skip"] is False
        assert found["zeros"]
        assert found["unchanged by skipping"]


def test_who_catches_an_error_is_told_not_to_step(workers: Reports) -> None:
    assert [report["caught"]["check"] for report in workers] == [False, False]


def test_gradients_that_are_zero_become_infinite_or_zero_with_the_others(workers: Reports) -> None:
    for report in workers:
        assert report["spared"] == {"scale": 2.0**9, "zeros": True}


def test_a_layer_that_is_thawed_is_averaged(workers: Reports) -> None:
    first, second = (report["thawed"]["found"] for report in workers)
    assert first == second
    assert None not in first[1]


def test_a_model_whose_hook_has_run_can_be_copied(workers: Reports) -> None:
    assert [report["copied"] for report in workers] == [{"same": True, "kept": 0}] * 2


def test_buckets_follow_the_order_of_the_model() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    matrices, vectors = ([p for p in model.parameters() if p.dim() == d] for d in (2, 1))
    infos = list(list_parameters(GradientAverager([*matrices, *vectors]).param_groups))
    order = {parameter: place for place, parameter in enumerate(model.parameters())}
    found = [[info.index for info in each] for each in divide(infos, 80, order)]
    assert found == [[2, 5], [1, 4], [0, 3]]


def test_another_setting_on_one_worker_is_an_error_on_all(workers: Reports) -> None:
    for report in workers:
        kind, text = report["differing"]["error"]
        assert kind == "WorkerMismatchError"
        assert "worker 0: rank=2" in text
        assert "worker 1: rank=3" in text
    first, second = (report["differing"]["goes on"] for report in workers)
    assert first["parameters"] == second["parameters"]


def test_an_exception_in_one_bucket_is_told_to_all(workers: Reports) -> None:
    kinds = [report["failing"]["error"][0] for report in workers]
    assert kinds == ["CollectiveError", "MemoryError"]
    assert "worker 1" in workers[0]["failing"]["error"][1]
    for report in workers:
        assert report["failing"]["unchanged"]
        hooked, twin = report["failing"]["goes on"]
        assert hooked == twin


@pytest.mark.parametrize("task", ["broken_off", "broken_off_inline"])
def test_a_backward_pass_that_is_broken_off_is_told_to_all(workers: Reports, task: str) -> None:
    kinds = [report[task]["error"][0] for report in workers]
    assert kinds == ["CollectiveError", "ZeroDivisionError"]
    assert "before all gradients were there" in workers[1][task]["check"][1]
    assert all(report[task]["unchanged"] for report in workers)


def test_a_worker_that_dies_is_an_error_and_no_wait(tmp_path: Path) -> None:
    done = run_programs([script.__file__, "dying", str(tmp_path)], 2, ends_others=False)
    assert (tmp_path / "0.json").exists(), done.stderr
    found = json.loads((tmp_path / "0.json").read_text())["dying"]
    kind, text = found["error"]
    assert kind == "CollectiveError"
    assert "has probably died" in text
    assert found["unchanged"]


def test_several_models_each_have_their_own(workers: Reports) -> None:
    for report in workers:
        hooked, averaged = report["two_models"]["found"]
        assert hooked == averaged


def test_resuming_goes_on_to_the_bit_in_either_form(workers: Reports) -> None:
    for report in workers:
        assert report["resumed"]["found"] == [report["resumed"]["whole"]] * 2


def test_groups_of_another_optimizer_may_differ_in_rank(workers: Reports) -> None:
    for report in workers:
        assert report["groups"] == {"ranks": [[1]] * 2 + [[3]] * 3, "written": ["lr", "params"]}


def test_a_parameter_that_the_state_does_not_know_is_an_error(workers: Reports) -> None:
    for report in workers:
        kind, text = report["unknown"]["error"]
        assert kind == "ValueError"
        assert "shape [16, 16]" in text


def test_sparse_gradients_are_refused(workers: Reports) -> None:
    assert [report["sparse"]["error"][0] for report in workers] == ["NotImplementedError"] * 2


def test_a_worker_without_batches_goes_on_sending_its_errors(workers: Reports) -> None:
    for report in workers:
        assert report["joined"]["stats"]["steps"] == 5
        for name in ("parameters", "q"):  # DDP gives all of them the last one's parameters
            own = report["joined"]["fingerprint"][name]
            assert own == workers[0]["joined"]["fingerprint"][name]


def test_without_its_work_ddp_averages_as_ever(workers: Reports) -> None:
    for report in workers:
        hooked, plain = report["detached"]["found"]
        assert hooked == plain
    assert workers[0]["detached"] == workers[1]["detached"]


def test_a_state_may_follow_another_in_the_same_group(workers: Reports) -> None:
    first, second = (report["again"]["found"] for report in workers)
    assert first == second == [first[0]] * 6


def test_it_needs_a_process_group() -> None:
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="Call init_process_group first"):
        CompressionState(torch.nn.Linear(2, 2))


def test_a_bucket_that_comes_after_the_exchange_has_failed_is_answered_at_once() -> None:
    own, future = Pass(), torch.futures.Future[torch.Tensor]()
    own.end()
    own.add({}, (future, torch.ones(2)), last=True)
    assert future.done()


def test_who_waits_for_gradients_waits_for_these_alone() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    own, waited = Pass(), []
    thread = threading.Thread(target=lambda: waited.append(own.wait_for([first])))
    thread.start()
    own.add({second: torch.ones(2)}, (torch.futures.Future(), torch.ones(2)), last=False)
    thread.join(0.05)
    assert thread.is_alive()
    own.add({first: torch.ones(2)}, (torch.futures.Future(), torch.ones(2)), last=False)
    thread.join(10)
    assert waited == [None]
    own.break_off(RuntimeError("no more"))
    with pytest.raises(RuntimeError, match="no more"):
        own.wait_for(None)


def test_jobs_run_in_order_and_in_another_thread() -> None:
    worker, found, done = Worker(), [], threading.Event()
    for number in range(3):
        worker.give(lambda n=number: found.append((n, threading.get_ident())))
    worker.give(done.set)
    assert done.wait(10)
    assert [number for number, _ in found] == [0, 1, 2]
    (identity,) = {thread for _, thread in found}
    assert identity != threading.get_ident()
    (thread,) = [thread for thread in threading.enumerate() if thread.ident == identity]
    del worker
    thread.join(10)
    assert not thread.is_alive()
