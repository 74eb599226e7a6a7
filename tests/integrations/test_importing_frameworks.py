"""Frameworks are imported by who asks for them, and whoever lacks one is told what to install."""

import ast
import importlib
import sys

import pytest

from tests.test_floors import FILES, IMPORTS

FRAMEWORKS = {
    "accelerate": {"accelerate"},
    "lightning": {"lightning", "pytorch_lightning"},
    "transformers": {"transformers"},
}


def imported(name: str) -> set[str]:
    """The packages that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


def test_nothing_else_imports_a_framework_or_what_does() -> None:
    modules = {f"efsgd.integrations.{name}": needs for name, needs in FRAMEWORKS.items()}
    for name in FILES:
        assert not IMPORTS[name] & modules.keys()
        assert imported(name) & set.union(*modules.values()) <= modules.get(name, set())


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_missing_framework_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in FRAMEWORKS[name]:
        for module in [each for each in sys.modules if each.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"efsgd.integrations.{name}", raising=False)
    with pytest.raises(ImportError, match=f"which is not installed.*pip install .?{name}"):
        importlib.import_module(f"efsgd.integrations.{name}")
