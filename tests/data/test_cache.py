import threading
from pathlib import Path

import pytest

from sdd.data.cache import cache_dir, cached
from sdd.errors import UserError


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SDD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def build(directory: Path) -> None:
    (directory / "value").write_text("right")


def no_build(directory: Path) -> None:
    pytest.fail(f"built {directory}")


def load(directory: Path) -> str:
    value = (directory / "value").read_text()
    if value != "right":
        raise UserError("damaged")
    return value


def test_where_the_cache_is(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert cache_dir(pytest.fail) == root
    monkeypatch.delenv("SDD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir(pytest.fail) == tmp_path / "xdg" / "sdd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir(pytest.fail) == tmp_path / "home" / ".cache" / "sdd"


def test_a_cache_that_cannot_be_written_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDD_CACHE", str(tmp_path / "file" / "cache"))
    notes: list[str] = []
    assert cached("key", build, load, notes.append) == "right"
    assert cached("key", no_build, load, notes.append) == "right"  # the same one for the whole process
    assert "cannot be written" in notes[0]


def test_an_entry_is_built_once_and_again_if_damaged(root: Path):
    assert cached("key", build, load, pytest.fail) == "right"
    assert cached("key", no_build, load, pytest.fail) == "right"
    (root / "key" / "value").write_text("wrong")
    assert cached("key", build, load, pytest.fail) == "right"
    assert [p.name for p in root.iterdir()] == ["key"]


def test_a_build_that_fails_leaves_nothing(root: Path):
    def fail(directory: Path) -> None:
        build(directory)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached("key", fail, load, pytest.fail)
    assert list(root.iterdir()) == []


def test_a_race_has_one_winner_and_no_loser(root: Path):
    meet = threading.Barrier(4)
    results: list[str] = []

    def slow(directory: Path) -> None:
        build(directory)
        meet.wait(timeout=20)

    threads = [
        threading.Thread(target=lambda: results.append(cached("key", slow, load, pytest.fail))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert results == ["right"] * 4
    assert [p.name for p in root.iterdir()] == ["key"]
