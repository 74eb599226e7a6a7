"""A Sphinx extension: the API reference is complete, and describes each thing once.

A package lists its public names in `__all__`. The build warns about

* a package with public names that no page describes;
* a name in `__all__` that no page describes, which is also how autodoc treats a name without a
  docstring;
* a public method or property of a described class without a docstring, its own or inherited.

What a package re-exports from a module inside it is described with the package, and left out where
the module is described.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cached_property
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

logger = logging.getLogger(__name__)


def public_modules(package_name: str) -> Iterator[ModuleType]:
    package = importlib.import_module(package_name)
    yield package
    for info in pkgutil.walk_packages(package.__path__, prefix=f"{package_name}."):
        if not any(part.startswith("_") for part in info.name.split(".")):
            yield importlib.import_module(info.name)


def home(module: ModuleType, name: str) -> str:
    """The outermost package that offers `name` of `module` as its own; else the module itself."""
    value = getattr(module, name, None)
    parts = module.__name__.split(".")
    for depth in range(1, len(parts)):
        package = importlib.import_module(".".join(parts[:depth]))
        if name in getattr(package, "__all__", ()) and getattr(package, name, None) is value:
            return package.__name__
    return module.__name__


def skip_reexported(
    app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any
) -> bool | None:
    """Handles `autodoc-skip-member`; None leaves the decision as it is."""
    module_name = app.env.current_document.autodoc_module
    if what != "module" or module_name.split(".")[0] != app.config.public_api_package:
        return None
    return True if home(importlib.import_module(module_name), name) != module_name else None


def gaps(package_name: str, described: set[str]) -> Iterator[str]:
    """One sentence for each gap between the package and the names that the pages describe."""
    for module in public_modules(package_name):
        if not hasattr(module, "__all__"):
            continue  # it offers nothing itself
        if module.__name__ not in described:
            yield f"module {module.__name__} is on no page"
        for name in (name for name in module.__all__ if not name.startswith("_")):
            if not hasattr(module, name):
                yield f"{module.__name__}.__all__ lists {name}, which does not exist"
                continue
            full_name = f"{home(module, name)}.{name}"
            if full_name not in described:
                yield f"{full_name} is on no page (has it a docstring?)"
            elif inspect.isclass(getattr(module, name)):
                yield from member_gaps(full_name, getattr(module, name), described)


def member_gaps(class_name: str, cls: type, described: set[str]) -> Iterator[str]:
    for name, member in vars(cls).items():
        is_documentable = inspect.isroutine(member) or isinstance(
            member, property | cached_property
        )
        if is_documentable and not name.startswith("_") and f"{class_name}.{name}" not in described:
            yield f"{class_name}.{name} has no docstring"


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Handles `env-check-consistency`."""
    described = set(env.domains.python_domain.objects)
    for gap in gaps(app.config.public_api_package, described):
        logger.warning("incomplete API reference: %s", gap, type="public_api")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("public_api_package", "", "env", [str])
    app.connect("autodoc-skip-member", skip_reexported)
    app.connect("env-check-consistency", check)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
