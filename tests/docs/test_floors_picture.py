"""The picture of the floors says what the imports of a package say."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("docutils", reason="the documentation needs it: pip install .[docs]")
EXTENSION = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "ext" / "floors.py"))


def package(folder: Path, **imports: str) -> Path:
    root = folder / "house"
    for name, line in imports.items():
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text(f'"""What {name} is for."""\n')
        (root / name / "code.py").write_text(f"{line}\n")
    (root / "__init__.py").write_text("from house.attic.code import everything\n")
    (root / "ground.py").write_text("import torch\n")
    return root


def test_arrows_point_down_and_what_follows_from_others_is_left_out(tmp_path: Path) -> None:
    root = package(
        tmp_path,
        attic="from house.hall.code import a\nfrom house.cellar import b",
        hall="def later():\n    import house.cellar.code",
        cellar="from house.ground import c",
    )
    folders = EXTENSION["read"](root)
    floors = [[folder.name for folder in row] for row in EXTENSION["floors"](folders)]
    assert floors == [["attic"], ["hall"], ["cellar"], ["modules"]]
    assert set(EXTENSION["arrows"](folders)) == {
        ("attic", "hall"),
        ("hall", "cellar"),
        ("cellar", "modules"),
    }
    picture = EXTENSION["draw"](folders, "a house")
    assert "What hall is for" in picture and "ground.py" in picture


def test_a_circle_is_an_error(tmp_path: Path) -> None:
    root = package(tmp_path, attic="import house.hall", hall="import house.attic")
    with pytest.raises(ValueError, match="in a circle: attic, hall"):
        EXTENSION["draw"](EXTENSION["read"](root), "a house")


def test_the_package_has_no_circle() -> None:
    folders = EXTENSION["read"](Path(__file__).parents[2] / "efsgd")
    assert "plan" in folders and EXTENSION["floors"](folders)[-1][0].name == EXTENSION["GROUND"]
