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


@pytest.mark.parametrize(("command", "output"), commands(), ids=lambda each: each.split()[-1])
def test_a_command_prints_what_its_page_shows(
    command: str,
    output: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = shlex.split(command)
    variables = [word for word in words if re.fullmatch(r"[A-Z_]+=\w+", word)]
    program, *arguments = words[len(variables) :]
    arguments = [str(ROOT / each) if each.startswith("docs/") else each for each in arguments]
    two_workers = ["--standalone", "--nproc-per-node", "2"]
    if program == "python":
        (script,) = arguments
        monkeypatch.syspath_prepend(str(TUTORIALS))
        runpy.run_path(script, run_name="__main__")  # here, where torch is loaded already
        printed = capsys.readouterr().out
    elif arguments[:4] == [*two_workers, str(ROOT / shlex.split(command)[-1])]:
        done = run_programs(arguments[3:], 2, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:  # torchrun starts them anew
        assert program == "torchrun"
        environment = {**os.environ, **dict(each.split("=") for each in variables)}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    expected = (TUTORIALS / output).read_text()
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", expected)
    measured, shown = (list(map(float, NUMBER.findall(text))) for text in (printed, expected))
    assert measured == pytest.approx(shown, rel=0.05, abs=0.5)
