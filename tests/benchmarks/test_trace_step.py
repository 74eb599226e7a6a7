"""What is counted of a step: the calls of one package's Python functions."""

import sys
from pathlib import Path

import pytest

from benchmarks import trace_step

FUNCTIONS = """
def called(times):
    return [other() for _ in range(times)]


def other():
    return len("built-in functions are not counted")
"""


def test_calls_are_those_of_one_package(tmp_path: Path) -> None:
    file = tmp_path / "package" / "functions.py"
    space: dict[str, object] = {}
    exec(compile(FUNCTIONS, str(file), "exec"), space)
    calls = trace_step.calls_within(file.parent, lambda: space["called"](3))  # type: ignore[operator]
    assert calls["functions.py", "called"] == 1
    assert calls["functions.py", "other"] == 3
    assert not trace_step.calls_within(tmp_path / "pack", lambda: space["called"](3))  # type: ignore[operator]
    assert sys.getprofile() is None


def test_steady_steps_make_the_same_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert trace_step.main(["--list"]) == 0
    first, *listed = capsys.readouterr().out.splitlines()
    assert trace_step.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [first]
    assert first.startswith("efsgd: ") and first.endswith(" Python calls")
    files, functions, calls = (int(word) for word in first.split() if word.isdigit())
    assert 1 < files < functions < calls
    assert len(listed) == functions
    assert sum(int(line.split()[0]) for line in listed) == calls


def test_without_the_clone_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trace_step.main(["--epfml", str(tmp_path)]) == 2
    assert "git clone" in capsys.readouterr().err
