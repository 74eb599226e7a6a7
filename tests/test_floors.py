"""The package is a house: a folder imports those on the floors below it, and nothing goes around.

Floors are listed from the top. Every import counts, those within functions as well.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "efsgd"
FLOORS = [
    {"integrations", "plan"},
    {"testing", "rank", "checkpoint", "privacy", "audit", "pipeline", "planning"},
    {"ddp"},
    {"optimizers"},
    {"compressors", "engine"},
    {"algorithms"},
    {"wire"},
    {"layout", "randomness", "profiling", "errors", "checks"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MOST_FLAT_MODULES, MOST_FLOORS, MOST_LINES = 5, 9, 300


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name: str) -> set[str]:
    """The modules of the package that a module imports by name."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            module = node.module or ""
            found |= {
                whole if (whole := f"{module}.{alias.name}") in FILES else module
                for alias in node.names
            }
    return found & FILES.keys()


def room_of(name: str) -> str:
    """A folder or a flat module; the package itself has no name."""
    return name.partition(".")[2].partition(".")[0]


IMPORTS = {name: imports_of(name) for name in FILES}
ROOMS = sorted({room_of(name) for name in FILES} - {""})


def longest_chain(arrows: dict[str, set[str]]) -> tuple[str, ...]:
    """The longest chain of imports. A chain that comes back to where it has been is an error."""
    done: dict[str, tuple[str, ...]] = {}

    def longest(at: str, way: tuple[str, ...]) -> tuple[str, ...]:
        assert at not in way, f"a circle: {' -> '.join((*way[way.index(at) :], at))}"
        if at not in done:
            tails = [longest(to, (*way, at)) for to in sorted(arrows[at])]
            done[at] = (at, *max(tails, key=len, default=()))
        return done[at]

    return max((longest(at, ()) for at in arrows), key=len)


def test_every_room_is_on_a_floor() -> None:
    assert set(ROOMS) <= FLOOR_OF.keys()


def test_modules_import_floors_below_them() -> None:
    upwards = [
        f"{name} imports {to}"
        for name, imported in IMPORTS.items()
        for to in sorted(imported)
        if (room := room_of(name)) not in ("", room_of(to))
        and FLOOR_OF[room] >= FLOOR_OF.get(room_of(to), -1)
    ]
    assert upwards == []


def test_no_module_imports_itself_through_others() -> None:
    longest_chain(IMPORTS)


def test_few_flat_modules_few_floors_short_files() -> None:
    flat = [room for room in ROOMS if (PACKAGE / f"{room}.py").exists()]
    assert len(flat) <= MOST_FLAT_MODULES
    arrows: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name, imported in IMPORTS.items():
        if room := room_of(name):
            arrows[room] |= {room_of(to) for to in imported} - {room}
    chain = longest_chain(arrows)
    assert len(chain) <= MOST_FLOORS, chain
    lines = {name: len(file.read_text().splitlines()) for name, file in FILES.items()}
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}
