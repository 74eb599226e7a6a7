"""A Sphinx extension: the API reference is complete.

A package lists its public names in `__all__`. The build warns about

* a name in the `__all__` of a package in `public_api` that no page describes, which is also how
  autodoc treats a name without a docstring;
* a public method or property of a described class without a docstring.

What a package takes over from another of them is described once, under any of the two.
"""

import importlib
import inspect
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

logger = logging.getLogger(__name__)


def gaps(packages: list[str], described: set[str]) -> Iterator[str]:
    """One sentence for each gap between the packages and the names that the pages describe."""
    places: dict[int, list[str]] = {}  # of each public object, the names under which it is offered
    for package in map(importlib.import_module, packages):
        for name in package.__all__:
            if not name.startswith("_"):
                value = getattr(package, name)
                places.setdefault(id(value), []).append(f"{package.__name__}.{name}")
                if inspect.isclass(value):
                    yield from member_gaps(value, f"{package.__name__}.{name}", described)
    for names in places.values():
        if not described.intersection(names):
            yield f"{' or '.join(names)} is on no page (has it a docstring?)"


def member_gaps(cls: type, class_name: str, described: set[str]) -> Iterator[str]:
    if class_name not in described:
        return
    for name, member in vars(cls).items():
        is_documentable = inspect.isroutine(member) or isinstance(
            member, property | cached_property
        )
        if is_documentable and not name.startswith("_") and f"{class_name}.{name}" not in described:
            yield f"{class_name}.{name} has no docstring"


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Handles `env-check-consistency`."""
    described = set(env.domains.python_domain.objects)
    for gap in gaps(app.config.public_api, described):
        logger.warning("incomplete API reference: %s", gap, type="public_api")


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("public_api", [], "env", [list])
    app.connect("env-check-consistency", check)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
