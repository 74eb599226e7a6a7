"""Programs of the structures that users' programs have, changed by one line or two."""

import inspect
from typing import Any

import pytest

from tests.integrations import programs_worker as script
from tests.launcher import launch

pytestmark = pytest.mark.xdist_group("processes")

Reports = list[dict[str, Any]]


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return launch(script.__file__, 2, tmp_path_factory.mktemp("programs"))


@pytest.mark.parametrize("name", script.PROGRAMS)
def test_it_trains_saves_and_resumes_to_the_bit(workers: Reports, name: str) -> None:
    for worker in workers:
        whole, resumed = worker[f"{name}, scratch"], worker[f"{name}, resume"]
        assert whole == resumed
        assert whole["parameters"] == workers[0][f"{name}, scratch"]["parameters"]
        assert whole["state"] == workers[0][f"{name}, scratch"]["state"]
        assert min(whole["errors"]) > 0  # something is compressed, and remembered
        assert whole["warnings"] == []


@pytest.mark.parametrize("name", script.PROGRAMS)
def test_two_lines_know_of_it(name: str) -> None:
    lines = inspect.getsource(script.PROGRAMS[name]).splitlines()
    own = [line for line in lines if "efsgd." in line or "attached." in line]
    assert len(own) <= 2, own
