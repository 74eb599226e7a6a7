"""A Sphinx extension: the folders of a package on floors, drawn from its imports.

The directive ``floors`` takes a package name and draws, as SVG inside the page, a box for each
folder of the package and one for the modules beside them. A box stands as high as it can: one floor
below the lowest of those that import from it. Arrows point to what is imported; one that follows
from others is left out. Folders that import from each other in a circle are a warning.
"""

import ast
import importlib.util
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

logger = logging.getLogger(__name__)

WIDTH, MAX_WIDTH, HEIGHT, GAP = 760, 310, 104, 40  # in pixels
GROUND = "modules"


@dataclass
class Folder:
    """A box: what is in one folder of the package, and from which others it imports."""

    name: str
    purpose: str = ""
    files: int = 0
    lines: int = 0
    imports: set[str] = field(default_factory=set)


def read(root: Path) -> dict[str, Folder]:
    """The folders of the package at `root`, by name; `GROUND` has the modules beside them."""
    found: dict[str, Folder] = {}
    beside = [path.stem for path in sorted(root.glob("*.py")) if path.stem != "__init__"]
    listed = ", ".join(f"{each}.py" for each in beside)
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if parts == ("__init__.py",):
            continue  # it gathers the public names, from everywhere
        name = parts[0] if len(parts) > 1 else GROUND
        folder = found.setdefault(name, Folder(name, purpose=listed))
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        folder.files += 1
        folder.lines += source.count("\n")
        if parts[1:] == ("__init__.py",):
            folder.purpose = (ast.get_docstring(tree) or "").split("\n")[0].rstrip(".")
        for module in imported(tree):
            package, *inner = module.split(".")
            if package == root.name and inner:
                folder.imports.add(GROUND if inner[0] in beside else inner[0])
    for folder in found.values():
        folder.imports &= found.keys() - {folder.name}
    return found


def imported(tree: ast.AST) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def floors(folders: Mapping[str, Folder]) -> list[list[Folder]]:
    """The folders of each floor, from the top.

    Raises:
        ValueError: some import from each other in a circle.
    """
    depth: dict[str, int] = {}
    left = dict(folders)
    while left:
        needed = set().union(*(folder.imports for folder in left.values()))
        free = [name for name in left if name not in needed]
        if not free:
            raise ValueError(f"folders import from each other in a circle: {', '.join(left)}")
        for name in free:
            importers = [each for each in folders.values() if name in each.imports]
            depth[name] = max((depth[each.name] + 1 for each in importers), default=0)
            del left[name]
    rows: dict[int, list[Folder]] = defaultdict(list)
    for name, floor in depth.items():
        rows[floor].append(folders[name])
    return [rows[floor] for floor in sorted(rows)]


def arrows(folders: Mapping[str, Folder]) -> Iterable[tuple[str, str]]:
    """Who imports from whom, without what follows from the rest."""

    def below(name: str) -> set[str]:
        direct = folders[name].imports
        return direct.union(*(below(each) for each in direct))

    for name, folder in folders.items():
        implied = set().union(*(below(each) for each in folder.imports))
        yield from ((name, target) for target in sorted(folder.imports - implied))


def draw(folders: Mapping[str, Folder], title: str) -> str:
    """The picture as SVG, in the colours of the page around it."""
    rows = floors(folders)  # raises where there is a circle, in which arrows would not end
    pairs = list(arrows(folders))
    floor_of = {folder.name: floor for floor, row in enumerate(rows) for folder in row}
    long = [(source, to) for source, to in pairs if floor_of[to] - floor_of[source] > 1]
    boxes = {}
    for floor, row in enumerate(rows):
        row.sort(key=lambda folder: (all(folder.name != source for source, _ in long), folder.name))
        step = WIDTH / len(row)
        for number, folder in enumerate(row):
            is_ground = folder.name == GROUND
            width = WIDTH - 60 if is_ground else min(MAX_WIDTH, step - 18)
            x, y = step * (number + 0.5), 8 + floor * (HEIGHT + GAP)
            boxes[folder.name] = Box(folder, x, y, width, 62 if is_ground else HEIGHT)
    height = max(box.bottom for box in boxes.values()) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}" style="width:100%;max-width:{WIDTH}px;color:inherit" '
        'font-family="inherit" text-anchor="middle" fill="currentColor">',
        '<defs><marker id="floors-tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 10 5 0 10z" fill="currentColor"/></marker>'
        "</defs>",
    ]
    for source, to in pairs:
        start, end = boxes[source], boxes[to]
        if (source, to) in long:  # in a lane of its own, left of all boxes in between
            lane = 6 + 7 * long.index((source, to))
            turn = start.bottom + GAP / 2 if start.left > lane else start.bottom
            first = start.x if start.left > lane else lane
            path = f"M{first:.0f} {start.bottom:.0f}V{turn:.0f}H{lane}V{end.y + end.height / 2:.0f}"
            path += f"H{end.left:.0f}"
        else:
            lean = 0.25 * (end.x - start.x)
            low, high = -0.4 * min(start.width, end.width), 0.4 * min(start.width, end.width)
            lean = max(low, min(high, lean))
            path = f"M{start.x + lean:.0f} {start.bottom:.0f}L{end.x - lean:.0f} {end.y:.0f}"
        parts.append(
            f'<path d="{path}" fill="none" stroke="currentColor" stroke-opacity="0.55" '
            'stroke-width="1.3" marker-end="url(#floors-tip)"/>'
        )
    parts += [box.drawn() for box in boxes.values()]
    return "\n".join([*parts, "</svg>"])


@dataclass
class Box:
    """Where a folder is drawn: the middle of the upper side, and the size."""

    folder: Folder
    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height

    def drawn(self) -> str:
        folder = self.folder
        heading = "beside the folders" if folder.name == GROUND else f"{folder.name}/"
        purpose = textwrap.wrap(folder.purpose, width=int(self.width / 6.4), max_lines=4)
        counts = f"{folder.files} files, {folder.lines:,} lines"
        parts = [
            f'<rect x="{self.left:.0f}" y="{self.y:.0f}" width="{self.width:.0f}" '
            f'height="{self.height:.0f}" rx="6" stroke="currentColor" stroke-opacity="0.6" '
            'fill="var(--color-background-secondary, #8882)"/>',
            text(self.x, self.y + 20, heading, 15, weight="bold"),
            text(self.x, self.bottom - 8, counts, 11, opacity=0.7),
        ]
        for number, line in enumerate(purpose):
            parts.append(text(self.x, self.y + 37 + 14 * number, line, 11.5))
        return "\n".join(parts)


def text(
    x: float, y: float, line: str, size: float, *, weight: str = "normal", opacity: float = 1.0
) -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" font-weight="{weight}" '
        f'opacity="{opacity}">{escape(line)}</text>'
    )


class Floors(SphinxDirective):
    """Draws the package that is its argument."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        package = self.arguments[0]
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        root = Path(spec.origin).parent
        for path in root.rglob("*.py"):
            self.env.note_dependency(str(path))
        try:
            picture = draw(read(root), f"The folders of {package}, and what they import")
        except ValueError as error:
            logger.warning("%s", error, location=self.get_location(), type="floors")
            return []
        return [nodes.raw("", picture, format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("floors", Floors)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
