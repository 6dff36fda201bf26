"""Trackers: asked for by a flag, imported only then, kept by a resumed run, and never the end of a run."""

import importlib.util
import json
import subprocess
import sys

import pytest
from helpers_train import TINY, little, rows

from sdd.commands.main import main
from sdd.train import config_io

#: What wandb and trackio have in common, written down call by call.
STAND_IN = """
import json, os, pathlib
FILE = pathlib.Path(os.environ["STAND_IN_FILE"])
def write(**values):
    with FILE.open("a") as file:
        file.write(json.dumps(values, default=str) + "\\n")
if os.environ.get("STAND_IN_KEY") == "older":
    class api:
        api_key = "key"
    def login(key=None):
        raise RuntimeError("it would ask at the terminal")
else:
    def login(prompt=True):
        assert not prompt
        if os.environ.get("STAND_IN_KEY") == "refused":
            raise RuntimeError("no server takes this key")
        return "STAND_IN_KEY" in os.environ
def Settings(**values):
    return values
class Run:
    def log(self, numbers, step):
        if os.environ.get("STAND_IN_BREAKS") == "log":
            raise RuntimeError("the server is\\ngone")
        assert __name__ == "wandb" or not {"time", "timestamp", "metrics"} & set(numbers), "trackio's own words"
        write(step=step, **numbers)
    def finish(self):
        if os.environ.get("STAND_IN_BREAKS") == "finish":
            raise RuntimeError("the server is gone")
        write(end=True)
def finish():
    print("bye")
    Run().finish()
def init(**values):
    print("hello")
    if os.environ.get("STAND_IN_BREAKS") == "init":
        raise RuntimeError("no way in")
    write(init=values)
    return Run()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Modules wandb and trackio that write their calls into a file."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name in ("wandb", "trackio"):
        (folder / f"{name}.py").write_text(STAND_IN)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("STAND_IN_FILE", str(tmp_path / "calls.jsonl"))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("STAND_IN_BREAKS", "STAND_IN_KEY"):
        monkeypatch.delenv(name, raising=False)
    config_io.save(little(tmp_path), tmp_path / "config.json")
    yield tmp_path
    for name in ("wandb", "trackio"):
        sys.modules.pop(name, None)


def train(folder, *more):
    return main(["train", str(folder / "config.json"), "--out", str(folder / "run"), *more])


def calls(folder):
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_gets_the_numbers_of_every_row_and_a_resumed_run_goes_on_there(stand_in, tracker):
    assert train(stand_in, "--steps", "4", "--tracker", tracker) == 0
    first = calls(stand_in)
    assert main(["resume", str(stand_in / "run"), "--steps", "8"]) == 0
    second = calls(stand_in)[len(first) :]
    starts = [found[0]["init"] for found in (first, second)]
    key = "id" if tracker == "wandb" else "name"
    assert starts[0][key] == starts[1][key]
    assert {start["resume"] for start in starts} == {"allow"}
    assert starts[0]["config"]["optim.lr"] == TINY.optim.lr
    assert first[-1] == second[-1] == {"end": True}
    given = [call for call in (*first, *second) if "step" in call]
    written = rows(stand_in / "run")
    assert [call["step"] for call in given] == [row["step"] for row in written]
    assert [call.get("loss") for call in given] == [row.get("loss") for row in written]


def test_wandb_is_offline_without_a_key_and_says_how_to_send_it(stand_in, capsys, monkeypatch):
    assert train(stand_in, "--steps", "4", "--tracker", "wandb") == 0
    assert calls(stand_in)[0]["init"]["mode"] == "offline"
    assert f"wandb sync {stand_in}/run/wandb/offline-run-*" in capsys.readouterr().err.replace("\n", "")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert main(["resume", str(stand_in / "run"), "--steps", "5"]) == 0
    assert [call["init"]["mode"] for call in calls(stand_in) if "init" in call] == ["offline", "disabled"]


@pytest.mark.parametrize(("key", "mode"), [("good", "online"), ("older", "online"), ("refused", "offline")])
def test_wandb_is_online_only_where_a_server_takes_the_key(stand_in, monkeypatch, key, mode):
    monkeypatch.setenv("STAND_IN_KEY", key)
    assert train(stand_in, "--steps", "4", "--tracker", "wandb") == 0
    assert [call["init"]["mode"] for call in calls(stand_in) if "init" in call] == [mode]


def test_what_a_tracker_prints_is_no_part_of_the_answer(stand_in, capsys):
    assert train(stand_in, "--steps", "4", "--tracker", "trackio", "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
@pytest.mark.parametrize(("tracker", "label"), [("wandb", "W&B"), ("trackio", "trackio")])
def test_a_broken_tracker_is_told_once_and_ends_nothing(stand_in, monkeypatch, capsys, tracker, label, broken):
    monkeypatch.setenv("STAND_IN_BREAKS", broken)
    assert train(stand_in, "--steps", "4", "--tracker", tracker) == 0
    assert capsys.readouterr().err.count(f"{label} gets nothing from here on") == 1
    assert json.loads((stand_in / "run" / "result.json").read_text())["status"] == "done"


def test_none_turns_a_tracker_off_and_another_takes_over(stand_in):
    assert train(stand_in, "--steps", "4", "--tracker", "wandb") == 0
    before = len(calls(stand_in))
    assert main(["resume", str(stand_in / "run"), "--steps", "5", "--tracker", "none"]) == 0
    assert main(["resume", str(stand_in / "run"), "--steps", "6"]) == 0
    assert len(calls(stand_in)) == before
    assert json.loads((stand_in / "run" / "tracker.json").read_text())["tracker"] == "none"


def test_a_tracker_that_is_gone_when_a_run_resumes_does_not_stop_it(stand_in, capsys, monkeypatch):
    assert train(stand_in, "--steps", "4", "--tracker", "trackio") == 0
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert main(["resume", str(stand_in / "run"), "--steps", "5"]) == 0
    assert capsys.readouterr().err.count("trackio gets nothing from here on") == 1


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "tensorboard"])
def test_a_tracker_without_its_package_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys, tracker):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    assert main(["train", "nano", "--out", str(tmp_path / "run"), "--tracker", tracker]) == 2
    assert capsys.readouterr().err == f"sdd: --tracker {tracker} needs {tracker}: pip install 'sdd-torch[{tracker}]'\n"
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_exist_is_one_line(tmp_path, capsys):
    assert main(["train", "nano", "--out", str(tmp_path / "run"), "--tracker", "wandbb"]) == 2
    assert "did you mean 'wandb'" in capsys.readouterr().err


def test_no_tracker_is_imported_unless_it_is_asked_for(stand_in):
    code = f"""
import sys
from sdd.commands.main import main
main(["train", {str(stand_in / "config.json")!r}, "--out", {str(stand_in / "run")!r}, "--steps", "4", "--threads", "1"])
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.splitlines()[-1].split())
    assert "torch" in modules
    assert {"wandb", "trackio"} & modules == set()
    assert not (stand_in / "calls.jsonl").exists()
