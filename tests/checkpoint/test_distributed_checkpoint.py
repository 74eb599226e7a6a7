"""Checkpoints of torch.distributed.checkpoint: nothing is lost, nothing is stored twice."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tests.checkpoint import checkpoint_worker as script
from tests.launcher import run_programs
from tests.simulation import bits, difference

pytestmark = pytest.mark.xdist_group("processes")

# Sums of four float64 numbers in another order, and three steps of training on top of that: some
# units in the last place, 2e-16 each.
ROUNDING = 1e-13

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where eight workers have left their checkpoints and reports."""
    made = tmp_path_factory.mktemp("checkpoints")
    done = run_programs([script.__file__, str(made)], 8)
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return [torch.load(folder / f"{worker}.pt") for worker in range(8)]


def of(results: Results, group: str) -> Results:
    """What the workers of a group report, in order."""
    return [worker[group] for worker in results if group in worker]


def errors_in(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: state["error"] for name, state in values["state"].items() if "error" in state}


def without_errors(values: dict[str, Any]) -> dict[str, Any]:
    """All that is equal on all workers; whose the errors are is not."""
    groups = [{**group, "worker": 0, "world_size": 0} for group in values["groups"]]
    state = {
        name: {kind: value for kind, value in kept.items() if kind != "error"}
        for name, kept in values["state"].items()
    }
    return {**values, "groups": groups, "state": state}


def test_asking_for_a_state_dict_takes_no_step_and_sends_nothing(results: Results) -> None:
    # One worker asked alone: a step would have waited for the others, and failed.
    for case in results[1]["alone"].values():
        assert case["sent"] == 0
        assert bits(case["after"]) == bits(case["before"])


@pytest.mark.parametrize("way", ["elastic", "plain"])
def test_equal_numbers_of_workers_go_on_to_the_bit(results: Results, way: str) -> None:
    # "plain" loads what async_save wrote while training went on.
    workers = of(results, "four")
    for worker in workers:
        assert bits(worker[way]["loaded"]) == bits(worker["exact"]["saved"])
        assert bits(worker[way]["trained"]) == bits(worker["exact"]["trained"])
    different = {str(bits(errors_in(worker["exact"]["saved"]))) for worker in workers}
    assert len(different) == script.SAVED_BY


@pytest.mark.parametrize("group", ["two", "three", "eight"])
def test_other_numbers_of_workers_get_the_mean_of_the_errors(results: Results, group: str) -> None:
    saved = [worker["exact"]["saved"] for worker in of(results, "four")]
    workers = of(results, group)
    assert len(workers) == {"two": 2, "three": 3, "eight": 8}[group]
    for worker in workers:
        loaded = worker["elastic"]["loaded"]
        assert bits(loaded) == bits(workers[0]["elastic"]["loaded"])
        assert bits(without_errors(loaded)) == bits(without_errors(saved[0]))
        assert loaded["groups"] == without_errors(loaded)["groups"]  # nobody's in particular
        found = errors_in(loaded)
        assert found.keys() == errors_in(saved[0]).keys() and len(found) == 4
        for name, error in found.items():
            mean = torch.stack([errors_in(values)[name] for values in saved]).mean(dim=0)
            assert difference(error, mean) <= ROUNDING


@pytest.mark.parametrize("group", ["two", "three", "four", "eight"])
def test_each_worker_reads_its_own_errors_or_their_mean(results: Results, group: str) -> None:
    names = errors_in(results[0]["four"]["exact"]["saved"])
    for number, worker in enumerate(of(results, group)):
        owner = f"worker {number} of 4" if group == "four" else "mean"
        read = sorted(f"optimizer.errors.{owner}.{name}" for name in names)
        assert sorted(worker["elastic"]["read"]) == read


@pytest.mark.parametrize("kind", ["nested", "flat"])
@pytest.mark.parametrize("group", ["two", "eight"])
def test_averaged_errors_need_nothing_but_dcp(results: Results, group: str, kind: str) -> None:
    saved = without_frozen(results[0]["four"]["averaged"]["saved"])
    for worker in of(results, "four"):
        assert bits(without_frozen(worker["averaged"]["saved"])) == bits(saved)
    for worker in of(results, group):
        assert bits(worker[kind]["loaded"]) == bits(saved)


def without_frozen(values: dict[str, Any]) -> dict[str, Any]:
    """As set_optimizer_state_dict of torch loads it: without the state of what is frozen."""
    return {**values, "state": {**values["state"], "1.weight": {}}}


@pytest.mark.parametrize("way", ["elastic", "nested", "flat"])
@pytest.mark.parametrize("group", ["two", "eight"])
def test_any_number_of_workers_trains_on_alike(results: Results, group: str, way: str) -> None:
    expected = results[0]["four"]["exact"]["trained"]["model"]
    for worker in of(results, group):
        for name, value in worker[way]["trained"]["model"].items():
            assert difference(value, expected[name]) <= ROUNDING


@pytest.mark.parametrize("group", ["two", "eight"])
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("without planner", ["Missing key", "optimizer.errors.worker ", " of "]),
        ("foreign", ["'optimizer'", "OptimizerState", "set_optimizer_state_dict"]),
        (
            "other model",
            ["0.weight", "[12, 10] there and [13, 10] in the optimizer", "Make model"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_all_and_changes_nothing(
    results: Results, group: str, case: str, words: list[str]
) -> None:
    for worker in of(results, group):
        assert all(word in worker[case]["text"] for word in words)
        assert bits(worker[case]["after"]) == bits(worker[case]["before"])


@pytest.mark.parametrize("way", ["own", "consolidated", "with_errors", "async", "averaged"])
def test_each_way_of_the_documentation_saves_and_loads(results: Results, way: str) -> None:
    workers = [worker["documented"][way] for worker in results]
    for worker in workers:
        loaded, saved = worker["loaded"], worker["saved"]
        if way == "consolidated":
            for name, error in errors_in(loaded).items():
                errors = [errors_in(each["saved"])[name] for each in workers]
                assert difference(error, torch.stack(errors).mean(dim=0)) <= ROUNDING
            loaded, saved = without_errors(loaded), without_errors(saved)
            statistics = loaded["model"]["4.running_mean"]
            assert statistics.tolist() == [sum(range(8)) / 8] * 6  # exact in float64
        assert bits(loaded) == bits(saved)


@pytest.mark.parametrize("name", ["exact", "async"])
def test_each_error_is_stored_once_and_nothing_twice(
    folder: Path, results: Results, name: str
) -> None:
    # Beside the errors of each worker, and what is equal on all of them, there are the means.
    metadata = FileSystemReader(folder / name).read_metadata()
    assert metadata.storage_data is not None
    workers = [worker["exact"]["saved"] for worker in of(results, "four")]
    expected: dict[str, Tensor] = {f"model.{k}": v for k, v in workers[0]["model"].items()}
    for parameter, kept in without_errors(workers[0])["state"].items():
        expected |= {f"optimizer.state.{parameter}.{k}": v for k, v in kept.items()}
    for worker, values in enumerate(workers):
        for parameter, error in errors_in(values).items():
            expected[f"optimizer.errors.worker {worker} of 4.{parameter}"] = error
    every = [errors_in(values) for values in workers]
    for parameter in every[0]:
        mean = torch.stack([errors[parameter] for errors in every]).mean(dim=0)
        expected[f"optimizer.errors.mean.{parameter}"] = mean
    kinds = metadata.state_dict_metadata
    tensors = {key for key, kind in kinds.items() if isinstance(kind, TensorStorageMetadata)}
    assert tensors == expected.keys()
    assert kinds.keys() - tensors == {"optimizer.efsgd_world_size", "optimizer.param_groups"}

    stored = [index.fqn for index in metadata.storage_data]
    assert sorted(stored) == sorted(kinds)  # one place for each key
    sizes = {file.name: file.stat().st_size for file in (folder / name).glob("*.distcp")}
    for index, place in metadata.storage_data.items():
        sizes[place.relative_path] -= place.length
        if index.fqn in tensors:
            if ".errors.worker " in index.fqn:
                owner = index.fqn.partition("worker ")[2][0]
                assert place.relative_path == f"__{owner}_0.distcp"
            with (folder / name / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                value = torch.load(io.BytesIO(file.read(place.length)))
            if ".errors.mean." in index.fqn:
                assert difference(value, expected[index.fqn]) <= ROUNDING
            else:
                assert bits(value) == bits(expected[index.fqn])
            # Not the buffer of which it is a view.
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    assert set(sizes.values()) == {0}  # there is nothing else in the files
