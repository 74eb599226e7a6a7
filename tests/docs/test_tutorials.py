"""The commands of the tutorials print what their pages show.

A page names a command in a console block, and includes the file with what it prints right after it.
Words and whole numbers must be the same; numbers with a decimal point depend on the machine, and
must be near.
"""

import difflib
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher import run_programs

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"
SHOWN = re.compile(
    r"```console\n\$ (?P<command>[^\n]*)\n```\n[^`]*```\{literalinclude\} (?P<output>\w+\.txt)"
)
NUMBER = re.compile(r"\d+\.\d+")


def commands() -> list[tuple[str, str]]:
    found = []
    for page in sorted(TUTORIALS.glob("*.md")):
        found += [match.group("command", "output") for match in SHOWN.finditer(page.read_text())]
    return found


def test_each_output_belongs_to_a_command() -> None:
    outputs = sorted(output for _, output in commands())
    assert outputs == sorted(path.name for path in TUTORIALS.glob("*.txt"))


def test_the_change_from_ddp_is_the_difference_of_the_two_scripts() -> None:
    before, after = (
        (TUTORIALS / name).read_text().splitlines()[1:]
        for name in ("ddp_and_sgd.py", "from_ddp_and_sgd.py")
    )
    block = (TUTORIALS / "from-ddp.md").read_text().split("```diff\n")[1].split("\n```")[0]
    shown = [line for line in block.split("\n") if line != " ..."]
    lines = list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:]
    assert shown == [line for line in lines if not line.startswith("@@")]


def with_restarts() -> list[tuple[str, str]]:
    return [each for each in commands() if "--max-restarts" in each[0]]


def split(command: str) -> tuple[dict[str, str], list[str]]:
    """Variables that are set before a command, and its words."""
    words = shlex.split(command)
    variables = [word for word in words if re.fullmatch(r"[A-Z_]+=\w+", word)]
    words = words[len(variables) :]
    words = [str(ROOT / each) if each.startswith("docs/") else each for each in words]
    return dict(each.split("=") for each in variables), words


def assert_as_shown(printed: str, output: str) -> None:
    expected = (TUTORIALS / output).read_text()
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", expected)
    measured, shown = (list(map(float, NUMBER.findall(text))) for text in (printed, expected))
    assert measured == pytest.approx(shown, rel=0.05, abs=0.5)


@pytest.mark.parametrize(("command", "output"), commands(), ids=lambda each: each.split()[-1])
@pytest.mark.xdist_group("processes")
def test_a_command_prints_what_its_page_shows(
    command: str,
    output: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, (program, *arguments) = split(command)
    if program == "python":
        (script,) = arguments
        monkeypatch.syspath_prepend(str(TUTORIALS))
        runpy.run_path(script, run_name="__main__")  # here, where torch is loaded already
        printed = capsys.readouterr().out
    else:
        assert (program, *arguments[:3]) == ("torchrun", "--standalone", "--nproc-per-node", "2")
        printed = as_torchrun_does(arguments[3:], tmp_path)
    assert_as_shown(printed, output)


def as_torchrun_does(arguments: list[str], folder: Path) -> str:
    """What two workers print that are forked here, and again once one of them has died."""
    lives, printed = 1, ""
    if arguments[0] == "--max-restarts":
        lives, arguments = 1 + int(arguments[1]), arguments[2:]
    for life in range(lives):
        variables = {"TORCHELASTIC_RESTART_COUNT": str(life)}
        done = run_programs(arguments, 2, variables=variables, folder=folder)
        printed += done.stdout
        if done.returncode == 0:
            return printed
    raise AssertionError(done.stderr)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "output"), with_restarts())
def test_torchrun_itself_starts_workers_anew(command: str, output: str, tmp_path: Path) -> None:
    """Each of its processes, of all lives, loads torch."""
    variables, words = split(command)
    environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words[1:]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert_as_shown(done.stdout, output)
