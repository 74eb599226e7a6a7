"""What the pages say of files is true: they exist, and functions are in the files named with them.

Who swaps SGD for an optimizer of this package is shown the form of momentum that goes with it. The
rest is checked by "make docs": every example runs, and every public name is described.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from efsgd.wire.traffic import TrafficCounter

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
#: A file or folder of the repository, as pages name it: in code, alone or in a command.
PATH = re.compile(r"(?<![\w/.-])(?:benchmarks|docs|efsgd|examples|tests)/[\w./*-]*")
CODE = re.compile(r"```.*?```|`[^`]+`", re.DOTALL)
#: A function or class and its file, as in `run` in `efsgd/wire/collectives.py`, or in brackets.
PLACED = re.compile(r"`([\w.]+)`[^`]{0,24}?(?: in |\()`(efsgd/[\w/]+\.py)`")
#: What is made by the commands on the pages.
MADE = ("docs/_build/",)
#: What looks like a path, and is the name of a figure in `metrics()`.
FIGURES = ("efsgd/relative_error", *(f"efsgd/{name}" for name in TrafficCounter().report()))
#: Where readers see optimizers being made: pages, and scripts, examples and docstrings of Python.
SCRIPTS = sorted(
    path for name in ("docs", "examples", "efsgd") for path in (ROOT / name).rglob("*.py")
)
MAKING = re.compile(
    r"(?<!class )\b(?:PowerSGDOptimizer|ErrorFeedbackSGD)(\((?:[^()]|\([^()]*\))*\))"
)
#: The oldest torch, as a requirement or in words.
TORCH = re.compile(r"torch(?:>=|,? (?=[\d.]+ or newer))(\d+\.\d+)")
LINK = re.compile(r"\]\((?!http)([^)#\s]+)")
BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_on_a_page_exist(page: Path) -> None:
    for code in CODE.findall(page.read_text(encoding="utf-8")):
        for name in PATH.findall(code):
            if not name.startswith((*MADE, *FIGURES)):
                assert list(ROOT.glob(name.rstrip("."))), f"{page.name} names {name}"


def test_the_readme_can_be_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1100


@pytest.mark.parametrize(
    "name", ["README.md", "constraints.txt", "docs/tutorials/first-training.md"]
)
def test_the_oldest_torch_is_the_one_that_is_installed(name: str) -> None:
    (oldest,) = TORCH.findall((ROOT / "setup.cfg").read_text(encoding="utf-8"))
    assert TORCH.findall((ROOT / name).read_text(encoding="utf-8")) == [oldest]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_files_that_are_linked_exist(name: str) -> None:
    """Of the pages of the documentation, sphinx says so itself."""
    links = LINK.findall((ROOT / name).read_text(encoding="utf-8"))
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_functions_of_the_architecture_page_are_in_the_files_beside_them() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    placed = PLACED.findall(" ".join(text.split()))
    assert len(placed) > 20
    assert [(name, file) for name, file in placed if name not in names(file)] == []


def names(file: str) -> Iterator[str]:
    """The classes and functions of a file, and the methods of its classes."""
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            methods = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
            yield from (f"{node.name}.{each}" for each in methods)


def test_who_makes_an_optimizer_says_which_form_of_momentum() -> None:
    unsaid = []
    for path in (*PAGES, *SCRIPTS):
        text = path.read_text(encoding="utf-8")
        shown = "\n".join(BLOCK.findall(text)) if path.suffix == ".md" else text
        # Settings that are passed on as a whole have it, too.
        made = [a for a in MAKING.findall(shown) if "momentum_form=" not in a and "**" not in a]
        unsaid += [f"{path.relative_to(ROOT)}: {arguments}" for arguments in made]
    assert unsaid == []


def test_the_examples_of_optimizers_are_found() -> None:
    text = (
        "optimizer = PowerSGDOptimizer(model.parameters(), lr=0.1)\nclass PowerSGDOptimizer(Base):"
    )
    assert MAKING.findall(text) == ["(model.parameters(), lr=0.1)"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(MAKING.findall("\n".join(BLOCK.findall(readme)))) >= 2
