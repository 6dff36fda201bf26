"""docs/design.md names every room, and no file that is gone."""

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "sdd"
PAGE = (Path(__file__).parents[1] / "docs" / "design.md").read_text()


def rooms() -> list[str]:
    """Modules of the package, and folders of modules at any depth."""
    modules = [file.stem for file in PACKAGE.glob("[!_]*.py")]
    return modules + [file.parent.relative_to(PACKAGE).as_posix() for file in PACKAGE.glob("*/**/__init__.py")]


@pytest.mark.parametrize("room", sorted(rooms()))
def test_a_room_has_a_line_with_its_purpose(room: str) -> None:
    assert re.search(rf"^\| `{room}` \| \S", PAGE, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+\.py)`", PAGE))))
def test_a_file_on_the_page_is_there(name: str) -> None:
    assert (PACKAGE / name).is_file()
