"""What killed processes leave beside files that are replaced as a whole."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdd.errors import UserError
from sdd.files import aside, aside_folder, remove_leftovers

NAMES = st.from_regex(r"[a-z][a-z0-9.-]{0,12}", fullmatch=True)
KILLED = "import os, pathlib, sys; from sdd.files import aside; f = aside(pathlib.Path(sys.argv[1])); "
KILLED += "f.__enter__().write_text('half'); os._exit(1)"


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_removed(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "config.json")], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(tmp_path, ["config.json"])
    assert not list(tmp_path.iterdir())


@given(name=NAMES, other=NAMES)
def test_nothing_else_is_removed(tmp_path_factory, name, other):
    folder, dead = tmp_path_factory.mktemp("run"), DEAD
    kept = {f".tmp-{name}-{os.getpid()}-1", f".tmp-{name}", f".tmp-step-{dead}", name, f".tmp-x{name}-{dead}-1"}
    kept |= {f".tmp-{other}-{dead}-1"} - {f".tmp-{name}-{dead}-1"}
    for file in (*kept, f".tmp-{name}-{dead}-1"):
        (folder / file).touch()
    remove_leftovers(folder, [name])
    assert {path.name for path in folder.iterdir()} == kept


def test_a_file_being_written_stays(tmp_path):
    with aside(tmp_path / "config.json") as temporary:
        temporary.write_text("whole")
        remove_leftovers(tmp_path, ["config.json"])
    assert (tmp_path / "config.json").read_text() == "whole"


DEAD = dead_process()


# --- folders


@given(names=st.lists(NAMES, min_size=1, max_size=3), fails=st.booleans())
def test_a_folder_is_whole_or_absent(tmp_path_factory, names, fails):
    top = tmp_path_factory.mktemp("of")
    folder = top.joinpath(*names)
    try:
        with aside_folder(folder) as temporary:
            (temporary / "one").touch()
            assert not folder.exists()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert not list(top.iterdir())
    else:
        assert [path.name for path in folder.iterdir()] == ["one"]
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_that_holds_something_is_refused_before_and_after(tmp_path):
    (tmp_path / "own").touch()
    with pytest.raises(UserError, match="exists: name a new folder"), aside_folder(tmp_path):
        pass
    with pytest.raises(UserError, match="exists: name a new folder"), aside_folder(tmp_path / "new"):
        (tmp_path / "new").write_text("another process was faster")
    assert (tmp_path / "new").read_text() == "another process was faster"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "own"]
