"""Sphinx configuration. Nothing is fetched while building."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "ext"), str(HERE.parent)]

import efsgd  # noqa: E402 (the checkout is put on the path first)

project = "efsgd"
author = "The efsgd developers"
copyright = f"2026, {author}"
release = version = efsgd.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "floors",
    "mathml",
    "public_api",
]
exclude_patterns = ["_build", "ext", "planning-tables.md"]  # the last is part of a page

# Every name in the `__all__` of these packages must be in the API reference.
public_api = [
    *(
        "efsgd",
        "efsgd.audit",
        "efsgd.checkpoint",
        "efsgd.compressors",
        "efsgd.integrations.accelerate",
        "efsgd.integrations.lightning",
        "efsgd.integrations.transformers",
        "efsgd.pipeline",
        "efsgd.planning",
        "efsgd.privacy",
        "efsgd.rank",
        "efsgd.testing",
    ),
    "efsgd.testing.strategies",
]

html_theme = "furo"
html_title = f"efsgd {release}"
html_math_renderer = "mathml"  # readable without a network
html_static_path = ["_static"]
html_css_files = ["formulas.css"]

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3

# `name` in a docstring is a reference to that name where it exists, and plain code where not.
default_role = "py:obj"

# Primes and quotation marks stay as they are written.
smartquotes = False

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

doctest_global_setup = """
import torch
import efsgd
torch.manual_seed(0)
"""
