"""efsgd.attach to an optimizer of a DistributedDataParallel model, with two processes."""

from typing import Any

import pytest

from tests.integrations import attach_ddp_worker as script
from tests.launcher import launch

pytestmark = pytest.mark.xdist_group("processes")

Reports = list[dict[str, Any]]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return launch(script.__file__, 2, tmp_path_factory.mktemp("attach_ddp"))


def test_a_resumed_run_is_the_uninterrupted_one_with_ddp_and_without(workers: Reports) -> None:
    for worker in workers:
        ends = worker["resumes"]
        assert ends["whole"] == ends["wrapped"] == ends["plain"]
        assert ends["whole"]["parameters"] == workers[0]["resumes"]["whole"]["parameters"]
        assert ends["whole"]["state"] == workers[0]["resumes"]["whole"]["state"]
    assert workers[0]["resumes"]["whole"]["efsgd"] != workers[1]["resumes"]["whole"]["efsgd"]


def test_an_overflow_of_one_is_skipped_by_all_and_the_rest_is_unscaled(workers: Reports) -> None:
    for worker in workers:
        found = worker["scaled"]
        assert found["scaled"] == found["unscaled"]
        assert found["scaled"]["parameters"] == workers[0]["scaled"]["scaled"]["parameters"]
        assert found["scale"] == 2.0**9
        assert found["stats"]["efsgd/skipped_steps"] == 1
        assert found["stats"]["efsgd/steps"] == 4


def test_a_scaler_that_nobody_tells_of_is_refused_on_all_workers(workers: Reports) -> None:
    for worker in workers:
        error = worker["scaled"]["untold"]
        assert error["type"] == "RuntimeError"
        assert "efsgd.attach(..., scaler=scaler)" in error["text"]


def test_a_skipped_average_is_a_step_without_effect(workers: Reports) -> None:
    for worker in workers:
        found = dict(worker["skipped"])
        assert found.pop("parameters") == workers[0]["skipped"]["parameters"]
        assert found == {"averages": False, "stays": True, "has_gradients": True, "moves": True}


def test_after_detach_ddp_averages_as_ever(workers: Reports) -> None:
    for worker in workers:
        found = worker["detached"]
        assert found["steps"] == 0
        assert found["keys"] == ["param_groups", "state"]
        assert found["difference"] < 1e-7  # float32's numerics of gradients below 1


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("with_another_hook", "ddp.module"),
        ("of_a_part", "Freeze what is not trained"),
        ("of_more", "Wrap a module that contains all of them"),
        ("with_a_group", "pass it there"),
        ("with_more_later", "before efsgd.attach"),
        ("after_no_sync", "zero_grad() after one that has raised"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_remedy(
    workers: Reports, case: str, words: str
) -> None:
    for worker in workers:
        error = worker["refusals"][case]
        kind = "RuntimeError" if case == "after_no_sync" else "ValueError"
        assert error["type"] == kind and words in error["text"], error


def test_the_model_within_ddp_is_noticed(workers: Reports) -> None:
    for worker in workers:
        texts = worker["refusals"]["averaged_twice"]
        assert any("pass it the DistributedDataParallel" in text for text in texts)
