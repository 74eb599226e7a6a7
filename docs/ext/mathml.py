"""A Sphinx extension: formulas as MathML, made while building, so that pages need no script.

It is chosen by ``html_math_renderer = "mathml"`` in conf.py.
"""

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


def write(translator: HTML5Translator, node: nodes.math | nodes.math_block, display: str) -> None:
    """Writes one formula; one that cannot be read is a warning, and stays as it is."""
    try:
        formula = convert(node.astext(), display=display)
    except Exception as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node, type="mathml")
        formula = translator.encode(node.astext())
    if display == "block":
        formula = f'<div class="math">{formula}</div>\n'
    translator.body.append(formula)
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda translator, node: write(translator, node, "inline"), None),
        block_renderers=(lambda translator, node: write(translator, node, "block"), None),
    )
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
