"""The table of the contract: its page, its probes, and that efsgd still answers as it says."""

import json
from typing import Any

import pytest

from benchmarks.contract import page
from benchmarks.contract.adapters import Adapter, Efsgd, Sgd
from benchmarks.contract.questions import (
    Missed,
    NotApplicable,
    Row,
    answer_of,
    describe_abort,
    describe_error,
)
from benchmarks.contract.rows import rows
from benchmarks.contract.runner import ask, ask_all, summary

# The probes of several workers run in processes.
pytestmark = pytest.mark.xdist_group("processes")

RESULT: dict[str, Any] = json.loads(page.RESULTS.read_text())
ALONE = [key for key, row in rows().items() if row.workers == 1]
TOGETHER = [key for key, row in rows().items() if row.workers > 1]


def told(key: str, candidate: str) -> str:
    """The answer that the file has."""
    answer: str = RESULT["answers"][key][candidate]["answer"]
    return answer


def test_the_page_is_what_the_answers_say() -> None:
    assert page.PAGE.read_text() == page.render(RESULT)


def test_every_row_is_asked_of_every_candidate_and_every_no_has_a_reason() -> None:
    assert list(RESULT["answers"]) == list(rows())
    for answers in RESULT["answers"].values():
        assert list(answers) == ["sgd", "hook", "epfml", "dion", "efsgd"]
        for answer in answers.values():
            assert answer["answer"] in page.MARKS
            assert answer["reason"] or answer["answer"] == "yes"


@pytest.mark.parametrize("adapter", [Sgd(), Efsgd()], ids=lambda adapter: adapter.name)
@pytest.mark.parametrize("key", ALONE)
def test_sgd_and_efsgd_answer_as_the_page_says(key: str, adapter: Adapter) -> None:
    answer = answer_of(rows()[key], adapter)
    assert answer.answer == told(key, adapter.name), answer.reason


def test_workers_of_efsgd_answer_as_the_page_says() -> None:
    for key, answers in ask_all(TOGETHER, ["efsgd"]).items():
        assert answers["efsgd"].answer == told(key, "efsgd"), (key, answers["efsgd"].reason)


def test_sgd_passes_what_is_asked_of_a_swap_in() -> None:
    # Otherwise a probe would ask for what nobody who comes from SGD can expect.
    assert {told(key, "sgd") for key in ALONE} == {"yes", "not probed"}
    assert {told(key, "sgd") for key in TOGETHER} == {"not applicable"}


def test_a_probe_that_does_not_end_is_a_no() -> None:
    assert ask("H1", "efsgd", limit=0.0).answer == "no"


def a_row(*, raises: Exception | None = None) -> Row:
    def probe(_: Any) -> None:
        if raises is not None:
            raise raises

    return Row("A1", "", "", 1, True, 1.0, probe)


@pytest.mark.parametrize(
    ("raises", "expected"),
    [
        (None, ("yes", "")),
        (Missed("it moved"), ("no", "it moved")),
        (ValueError("no such thing\nat all"), ("no", "ValueError: no such thing")),
        (NotApplicable("it has none"), ("not applicable", "it has none")),
    ],
    ids=str,
)
def test_what_a_probe_raises_is_the_answer(
    raises: Exception | None, expected: tuple[str, str]
) -> None:
    answer = answer_of(a_row(raises=raises), Sgd())
    assert (answer.answer, answer.reason) == expected


def test_reasons_name_no_machine() -> None:
    refused = RuntimeError("[/home/me/gloo/pair.cc:537] Read error [127.0.0.1]:3979: reset")
    assert describe_error(refused) == "RuntimeError: Read error : reset"
    log = "stage: one\nterminate called\n  what():  [enforce fail at /home/gloo/pair.cc:4] a < b.\n"
    assert describe_abort(log) == "one: a worker was aborted: a < b."
    with pytest.raises(AssertionError) as caught:
        raise AssertionError
    assert "raise AssertionError (test_contract_page.py)" in describe_error(caught.value)
    for answers in RESULT["answers"].values():
        for answer in answers.values():
            assert not any(start in answer["reason"] for start in ("/home", "/tmp", "/work"))


def test_the_first_no_of_several_workers_counts() -> None:
    def said(answer: str, reason: str, time: float) -> dict[str, Any]:
        return {"answer": answer, "reason": reason, "time": time}

    late, early = said("no", "a time-out", 2.0), said("no", "the cause", 1.0)
    assert summary([late, early], 2, None).reason == "the cause"
    assert summary([said("yes", "", 1.0), said("yes", "", 2.0)], 2, None).answer == "yes"
    assert summary([said("yes", "", 1.0)], 2, 60.0).reason == "it did not end within 60 s"
    assert summary([said("yes", "", 1.0)], 2, None).reason == "a process ended without an answer"
