"""The code is the paper, line by line, and the paper map in docs/ says where each line is.

Claims: in `efsgd/`, every line of the two algorithms that computes something is marked by exactly
one comment, in a file of its algorithm; and docs/paper-map.md names the function around it.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAPER_MAP = ROOT / "docs" / "paper-map.md"

# What must be marked. The other lines of the paper open and close functions and loops, name
# hyperparameters, initialize state, or are the user's own backward pass (Algorithm 2, line 6).
MARKED_LINES = {1: (3, 4, 5, 6, 7, 8, 11), 2: (7, 8, 9, 10, 11, 12, 13)}
FILES = {
    1: {"efsgd/algorithms/powersgd.py", "efsgd/algorithms/low_rank/products.py"},
    2: {"efsgd/algorithms/error_feedback.py"},
}

# "# Alg. 2, line 9", and for several lines at once "# Alg. 2, lines 8 and 10".
MARK = re.compile(r"#\s*Alg\. (?P<algorithm>\d+), lines? (?P<lines>\d+(?:(?:, | and )\d+)*)")


class Mark(NamedTuple):
    """Where a line of the paper is, according to the code or to the paper map."""

    algorithm: int
    line: int
    file: str
    function: str


def marks_in_code() -> Iterator[Mark]:
    for path in sorted((ROOT / "efsgd").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        file, tree = path.relative_to(ROOT).as_posix(), ast.parse(source)
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and (match := MARK.match(token.string)):
                function = function_around(token.start[0], tree)
                for line in re.findall(r"\d+", match["lines"]):
                    yield Mark(int(match["algorithm"]), int(line), file, function)


def function_around(line: int, tree: ast.Module) -> str:
    """`function` or `Class.method`; a function inside a function counts as part of it."""
    names, scope = [], tree.body
    while True:
        for node in scope:
            is_scope = isinstance(node, ast.ClassDef | ast.FunctionDef)
            if is_scope and node.lineno <= line <= (node.end_lineno or line):
                names.append(node.name)
                scope = node.body if isinstance(node, ast.ClassDef) else []
                break
        else:
            return ".".join(names)


def marks_in_paper_map() -> Iterator[Mark]:
    algorithm = 0
    for text in PAPER_MAP.read_text(encoding="utf-8").splitlines():
        if text.startswith("## "):
            heading = re.match(r"## Algorithm (\d+)", text)
            algorithm = int(heading[1]) if heading else 0
        row = re.match(r"\| (\d+) \|.*\| `([^`|]+)` \| `([^`|]+)` \|$", text)
        if algorithm and row:
            yield Mark(algorithm, int(row[1]), row[3], row[2])


@pytest.mark.parametrize("algorithm", MARKED_LINES)
def test_every_line_is_marked_once_in_a_file_of_its_algorithm(algorithm: int) -> None:
    marks = [mark for mark in marks_in_code() if mark.algorithm == algorithm]
    assert sorted(mark.line for mark in marks) == list(MARKED_LINES[algorithm])
    assert {mark.file for mark in marks} == FILES[algorithm]


def test_no_mark_names_another_algorithm() -> None:
    assert {mark.algorithm for mark in marks_in_code()} == set(MARKED_LINES)


def test_the_paper_map_names_the_function_of_every_mark() -> None:
    mapped = [mark for mark in marks_in_paper_map() if mark.line in MARKED_LINES[mark.algorithm]]
    assert sorted(mapped) == sorted(marks_in_code())


@pytest.mark.parametrize("algorithm", MARKED_LINES)
def test_the_paper_map_follows_the_paper(algorithm: int) -> None:
    lines = [mark.line for mark in marks_in_paper_map() if mark.algorithm == algorithm]
    assert lines and lines == sorted(lines)


def test_the_paper_map_names_files_and_functions_that_exist() -> None:
    for mark in marks_in_paper_map():
        if mark.file.endswith(".py"):
            scope = ast.parse((ROOT / mark.file).read_text(encoding="utf-8")).body
            for name in mark.function.split("."):
                found = [node for node in scope if getattr(node, "name", None) == name]
                assert found, f"{mark.file} has no {mark.function}"
                scope = getattr(found[0], "body", [])
